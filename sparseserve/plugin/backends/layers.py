"""What the attention layers of both backends have in common: their policy, their plan and their part of the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparseserve import ops
from sparseserve.decode.layer import decode_layer
from sparseserve.decode.views import page_state
from sparseserve.errors import UnsupportedError
from sparseserve.footprint.groups import store_heads
from sparseserve.footprint.stores import Memory, memory_of
from sparseserve.model import ModelShape
from sparseserve.plugin.backends.spec import with_page_state
from sparseserve.plugin.head_memory.attention import GroupedHeads, GroupedStep
from sparseserve.plugin.head_memory.pool import HeadGroups
from sparseserve.plugin.settings import head_shape, model_shape, policy_of
from sparseserve.plugin.support.checks import check_attention, group_problems
from sparseserve.plugin.watch.meter import Meter
from sparseserve.policies import Policy
from sparseserve.policies.base import SparseLayer
from sparseserve.types import LayerPlan, PagedKV, PageState

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from sparseserve.plugin.backends.cpu import SparseCPUImpl
    from sparseserve.plugin.backends.cuda import SparseCUDAImpl

M = TypeVar("M")
VllmLayer = Any  # an Attention, which is neither of the types that vLLM's backends give it

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what its own loggers say


class SparseBackend(AttentionBackend):
    """vLLM asks the class for its spec outside of any config; the layers were built just before, within theirs."""

    policy: ClassVar[Policy | None] = None
    groups: ClassVar[HeadGroups | None] = None

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.groups is not None:
            return cls.groups.layers_spec(spec)
        return spec if cls.policy is None else with_page_state(spec, cls.policy)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages as runs of slots need all layers of a page side by side."""
        if cls.groups is not None:
            return (KVCacheLayout.BLHNC,)
        layouts = super().supported_kv_cache_layouts()
        assert layouts is not None
        return layouts


class SparseImpl(AttentionImpl[Any]):  # Any: of metadata, each backend has its own
    """One layer; comes before vLLM's own class among the bases."""

    backend: ClassVar[type[SparseBackend]]  # which vLLM's spec is made with
    views: ClassVar[staticmethod[[Tensor], PagedKV]]  # of the cache

    policy: Policy | None = None
    _layer: SparseLayer | None = None
    _cache: int | None = None  # where the layer's cache was when it was bound
    heads: GroupedHeads | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # whatever vLLM's own class takes
        super().__init__(*args, **kwargs)  # type: ignore[safe-super]  # vLLM's own class is between
        self._config = get_current_vllm_config()
        self.backend.policy, self.backend.groups = policy_of(self._config), None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Group the heads, before vLLM asks what their pages are; the first layer does it for all."""
        super().process_weights_after_loading(act_dtype)
        policy = self.backend.policy
        if policy is not None and policy.frees_pages and self.backend.groups is None:
            self.backend.groups = group_heads(self._config, policy)

    def bind(
        self,
        policy: Policy,
        plan: LayerPlan,
        kept: PageState | None,
        meter: Meter | None,
        heads: GroupedHeads | None,
    ) -> None:
        """Take the layer's plan, and the groups of its heads, if any.

        `meter` is the one to report a finished step to, for the last layer only.
        """
        self.policy, self._plan, self._page_state, self._meter = policy, plan, kept, meter
        self.heads, self._layer = heads, None

    def unbind(self) -> None:
        """Let go of the cache's pages."""
        self._layer = None

    def bound(self, kv_cache: Tensor) -> SparseLayer:
        """The layer over its part of the cache."""
        assert self.policy is not None
        if self._layer is None or self._cache != kv_cache.data_ptr():
            self._cache = kv_cache.data_ptr()
            pages = kv_cache if self.heads is None else self.heads.groups.pages
            state = page_state(pages, self._page_state)
            places = None if self.heads is None else self.heads.places
            kv = replace(self.views(pages), places=places)
            self._layer = SparseLayer(self.policy, self._plan, kv, state, self.scale)
        return self._layer

    def _write_groups(
        self, heads: GroupedHeads, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values [>= T, H, D] to the pages of their groups; `slot_mapping` [T] is the first group's."""
        if get_forward_context().attn_metadata is None:
            return  # vLLM warms up, without a token to keep
        tokens = slot_mapping.shape[0]
        ops.write_tokens(key[:tokens], value[:tokens], heads.groups.slot_mappings, self.bound(kv_cache).kv)

    def _forward_groups(
        self, layer: VllmLayer, query: Tensor, kv_cache: Tensor, batch: GroupedStep, output: Tensor
    ) -> Tensor:
        bound, heads = self.bound(kv_cache), self.heads
        assert heads is not None
        if batch.decode is not None:
            decode_layer(bound, batch.decode, query[: batch.rows], output[: batch.rows])
            if self._meter is not None:
                self._meter.count_tokens(batch.decode)
        if batch.prompts and heads.full is not None:
            tokens, mine = slice(batch.rows, batch.prompts[-1].tokens.stop), heads.full
            pages, metadata = heads.groups.pages[:, heads.full_slots], batch.vllm[len(mine.kv)]
            asked = query[tokens, mine.query]
            out = torch.empty_like(asked)
            # As above. Keys and values are read from the pages.
            super().forward(layer, asked, None, None, pages, metadata, out)  # type: ignore[arg-type, safe-super]
            output[tokens, mine.query] = out
        if heads.windowed is not None:
            for prompt in batch.prompts:
                for piece in prompt.pieces(heads.piece):
                    heads.attend_windows(piece, bound, query[piece.tokens], output[piece.tokens])
        return output


def group_heads(config: VllmConfig, policy: Policy) -> HeadGroups | None:
    """The groups of the model's KV heads, known to vLLM; None where every head keeps everything."""
    if problems := list(group_problems(config, policy)):
        raise UnsupportedError(*problems)
    layer = next(iter(get_layers_from_vllm_config(config, Attention).values()))
    model = model_shape(config, head_shape(layer), get_tensor_model_parallel_rank())
    storage = store_heads(policy, model)
    if storage.windows == (None,):
        return None
    rows, device = config.scheduler_config.max_num_seqs, device_of(config)
    tokens = config.scheduler_config.max_num_batched_tokens
    groups = HeadGroups(storage, model, layer.kv_cache_torch_dtype, rows, tokens, device)
    groups.register(config)
    return groups


def bind_layers(
    config: VllmConfig,
    spec: AttentionSpec,
    layers: Mapping[str, Attention],
    plans: Sequence[LayerPlan],
    policy: Policy,
    model: ModelShape,
    meter: Meter,
    scratch: Tensor | None = None,
) -> HeadGroups | None:
    """Give every layer its plan and its room in the pages; the last one reports to `meter`.

    Returns the groups of the heads, if they have any; `scratch` is where blocks meet in their prompts, on CUDA.
    """
    groups = impl_of(next(iter(layers.values()))).backend.groups
    memory = memory_of(policy, plans, model, spec.dtype.itemsize, groups.storage if groups else None)
    meter.set_memory(memory, model.max_len)
    _log_capacity(memory, config.cache_config.num_gpu_blocks, model.max_len)
    kept = policy.page_state(model.heads, spec.block_size)
    for (name, layer), plan in zip(layers.items(), plans, strict=True):
        impl = impl_of(layer)
        check_attention(name, impl)
        heads = GroupedHeads(groups, plan.layer, scratch) if groups else None
        impl.bind(policy, plan, kept, meter if plan is plans[-1] else None, heads)
    return groups


def impl_of(layer: Attention) -> SparseCPUImpl | SparseCUDAImpl:
    """A layer's attention, where the backend is ours."""
    return cast("SparseCPUImpl | SparseCUDAImpl", layer.impl)  # vLLM makes it by our get_impl_cls


def of_layer(
    metadata: dict[str, AttentionMetadata] | list[dict[str, AttentionMetadata]], layer: torch.nn.Module
) -> AttentionMetadata:
    """A layer's metadata among that of all layers; a list would be of micro-batches, which no backend of ours takes."""
    assert isinstance(metadata, dict) and isinstance(layer, Attention)
    return metadata[layer.layer_name]


def device_of(config: VllmConfig) -> torch.device:
    """The worker's device."""
    device = config.device_config.device
    assert isinstance(device, torch.device)
    return device


def _log_capacity(memory: Memory, blocks: int | None, longest: int) -> None:
    """Say how many tokens the cache holds in rows of `longest`; vLLM has no blocks yet while it profiles."""
    if blocks:
        tokens, dense = memory.capacity(blocks - 1, longest)  # vLLM keeps block 0 empty
        logger.info_once(
            f"sparseserve: KV cache for {tokens:,} tokens at {longest:,} per request, dense {dense:,} "
            f"({memory.row(longest).ratio:.2f}x)"
        )


def extended(metadata: Callable[..., M], parent: DataclassInstance, **sparse: object) -> M:
    """vLLM's metadata as our subclass of it, with our fields."""
    return metadata(**{field.name: getattr(parent, field.name) for field in fields(parent)}, **sparse)
