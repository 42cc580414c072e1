"""What the attention layers of both backends have in common: their policy, their plan and their part of the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from sparseserve.cache import summaries
from sparseserve.decode import SparseLayer
from sparseserve.plugin.settings import check_attention, policy_of
from sparseserve.plugin.stats import Meter
from sparseserve.policies import Policy
from sparseserve.types import HeadShape, LayerPlan, PagedKV


class SparseImpl:
    """One layer; comes before vLLM's own class among the bases."""

    backend: ClassVar[type[AttentionBackend]]  # whose `policy` vLLM's spec is made with
    views: ClassVar[Callable[[Tensor], PagedKV]]  # of the cache

    _policy: Policy | None = None
    _layer: SparseLayer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = get_current_vllm_config()
        self.backend.policy = policy_of(self._config)

    def bind(self, policy: Policy, plan: LayerPlan, summary_shape: tuple[int, ...], meter: Meter | None) -> None:
        """Take the layer's plan; `meter` is the one to report a finished step to, for the last layer only."""
        self._policy, self._plan, self._summary_shape, self._meter = policy, plan, summary_shape, meter
        self._layer = None

    def _bound(self, kv_cache: Tensor) -> SparseLayer:
        if self._layer is None or self._layer.kv.key.data_ptr() != kv_cache.data_ptr():
            summary = summaries(kv_cache, self._summary_shape, self._policy.summary_dtype)
            self._layer = SparseLayer(self._policy, self._plan, self.views(kv_cache), summary, self.scale)
        return self._layer


def bind_layers(
    config: VllmConfig,
    spec: AttentionSpec,
    layers: Mapping[str, Attention],
    plans: Sequence[LayerPlan],
    policy: Policy,
    heads: HeadShape,
    meter: Meter,
) -> None:
    """Give every layer its plan and its room in the pages; the last one reports to `meter`."""
    meter.set_kv_bytes(spec, config.cache_config.num_gpu_blocks or 0, len(layers))
    summary_shape = policy.summary_shape(heads, spec.block_size)
    for (name, layer), plan in zip(layers.items(), plans, strict=True):
        check_attention(name, layer.impl)
        layer.impl.bind(policy, plan, summary_shape, meter if plan is plans[-1] else None)


def extended(metadata: type, parent: object, **sparse: object) -> Any:
    """vLLM's metadata as our subclass of it, with our fields."""
    return metadata(**{field.name: getattr(parent, field.name) for field in fields(parent)}, **sparse)
