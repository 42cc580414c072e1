"""The check at start-up: one row on real pages, through the backend's own builder and layers.

Every layer must give what the reference gives for the policy's selection, and attend to no more than the policy says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_worker import Worker

from sparseserve import reference
from sparseserve.errors import SelfCheckError
from sparseserve.plugin.backends.builder import Metadata, SparseBuilder
from sparseserve.plugin.backends.layers import SparseImpl, device_of, impl_of
from sparseserve.plugin.head_memory.attention import GroupedStep
from sparseserve.plugin.settings import head_shape, policy_of
from sparseserve.plugin.watch.metrics import SELF_CHECK
from sparseserve.policies import Policy
from sparseserve.types import CPU, LayerPlan, PagedKV, PageTable, Selection, Step

ROUNDING = 1e-9  # of means over heads
TOLERANCE = 0.05  # relative; numbers of 16 bits differ by a tenth of it


def check_worker_attention(worker: Worker) -> None:
    """Raise SelfCheckError unless the policy's attention is what this worker computes; before any request."""
    config = worker.vllm_config
    if (policy := policy_of(config)) is None:
        return
    layers = get_layers_from_vllm_config(config, Attention)
    for name, layer in layers.items():
        if not isinstance(layer.impl, SparseImpl) or layer.impl.policy != policy:
            raise SelfCheckError(f"{name} attends by {type(layer.impl).__name__}, without the policy {policy.name}")
    builders = [
        (builder, group.layer_names)
        for groups in worker.model_runner.attn_groups
        for group in groups
        for builder in group.metadata_builders[:1]
        if isinstance(builder, SparseBuilder)
    ]
    for builder, names in builders:
        _Row(config, policy, builder, {name: layers[name] for name in names if name in layers}).check()
    SELF_CHECK.labels(policy.name).set(1)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A layer's random row."""

    query: Tensor  # [1, Hq, D]
    key: Tensor  # [T, H, D]
    value: Tensor  # [T, H, D]


class _Row:
    """A row just long enough for the policy to act, as far as the cache and the context go."""

    def __init__(
        self, config: VllmConfig, policy: Policy, builder: SparseBuilder, layers: Mapping[str, Attention]
    ) -> None:
        self._config, self._policy, self._builder, self._layers = config, policy, builder, layers
        first = next(iter(layers.values()))
        self._heads, self._dtype = head_shape(first), first.kv_cache_torch_dtype
        self._device = device_of(config)
        self._groups = impl_of(first).backend.groups
        self._page = config.cache_config.block_size
        tables = 1 if self._groups is None else self._groups.tables.shape[0]
        blocks = config.cache_config.num_gpu_blocks
        assert blocks is not None
        pages = (blocks - 1) // tables  # vLLM keeps block 0 empty
        wanted = policy.dense_up_to + self._page
        self._length = min(wanted, config.model_config.max_model_len, pages * self._page)
        used = -(-self._length // self._page)
        self._tables = 1 + torch.arange(tables * used, dtype=torch.int32, device=self._device).view(tables, 1, used)

    def check(self) -> None:
        """Write the row, decode its last token, compare."""
        with torch.inference_mode(), self._uncounted():
            chunk = self._config.scheduler_config.max_num_batched_tokens
            for start in range(0, self._length - 1, chunk):
                self._write(range(start, min(start + chunk, self._length - 1)))
            common, metadata = self._batch(range(self._length - 1, self._length), in_prompt=False)
            with self._forward(metadata):
                for number, (name, layer) in enumerate(self._layers.items()):
                    self._decode(name, layer, self._draw(number), common, metadata)

    def _forward(self, metadata: Metadata) -> AbstractContextManager[None]:
        """vLLM's forward context without what its ranks agree on first: they check one by one."""
        return override_forward_context(create_forward_context(dict.fromkeys(self._layers, metadata), self._config))

    def _write(self, tokens: range) -> None:
        common, metadata = self._batch(tokens, in_prompt=True)
        with self._forward(metadata):
            for number, layer in enumerate(self._layers.values()):
                drawn = self._draw(number)
                key, value = (part[tokens.start : tokens.stop] for part in (drawn.key, drawn.value))
                impl_of(layer).do_kv_cache_update(layer, key, value, layer.kv_cache, common.slot_mapping)

    def _decode(
        self, name: str, layer: Attention, drawn: _Drawn, common: CommonAttentionMetadata, metadata: Metadata
    ) -> None:
        impl = impl_of(layer)
        key, value, out = drawn.key[-1:], drawn.value[-1:], torch.empty_like(drawn.query)
        impl.do_kv_cache_update(layer, key, value, layer.kv_cache, common.slot_mapping)
        impl.forward(layer, drawn.query, key, value, layer.kv_cache, metadata, out)
        step = metadata.decode if isinstance(metadata, GroupedStep) else getattr(metadata, "step", None)
        plan = impl._plan
        if step is None:
            if self._length > self._policy.dense_up_to:
                raise SelfCheckError(f"{name}: a row of {self._length} tokens does not reach {self._policy.name}")
            return  # no row gets as long as the policy asks for, which the launcher refuses
        expected = self._reference(drawn, step.attends_to(plan), impl.scale)
        error = float((out.to(CPU).float() - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            raise SelfCheckError(f"{name} is {error:.1%} off what {self._policy.name} selects, as the reference has it")
        self._check_count(name, plan, step)

    def _check_count(self, name: str, plan: LayerPlan, step: Step) -> None:
        attended = step.attended_dense if plan.dense_output else step.attended
        tokens = float(attended[plan.layer].double().mean())
        if tokens > (most := self._policy.expected_tokens(plan, self._length)) * (1 + ROUNDING):
            raise SelfCheckError(f"{name} attends to {tokens:.0f} tokens of {self._length}, more than {most:.0f}")

    def _reference(self, drawn: _Drawn, selection: Selection, scale: float) -> Tensor:
        """The reference's output [1, Hq, D] fp32, from what was drawn, not from what the cache holds."""
        kv = PagedKV(*(self._paged(part) for part in (drawn.key, drawn.value)))
        pages = torch.arange(kv.key.shape[0], dtype=torch.int32)[None]
        table = PageTable(pages, torch.tensor([self._length]))
        chosen = Selection(
            selection.spans.to(CPU), selection.units.to(CPU), selection.count.to(CPU), selection.unit_tokens
        )
        return reference.attend(drawn.query.to(CPU), kv, table, chosen, scale)[0]

    def _paged(self, tokens: Tensor) -> Tensor:
        """tokens [T, H, D] as pages [N, H, P, D] of one row."""
        missing = -len(tokens) % self._page
        padded = torch.nn.functional.pad(tokens.to(CPU), (0, 0, 0, 0, 0, missing))
        return padded.view(-1, self._page, *tokens.shape[1:]).transpose(1, 2)

    def _draw(self, layer: int) -> _Drawn:
        """The same at every call."""
        random, heads = torch.Generator().manual_seed(layer), self._heads
        shapes = (1, heads.query_heads), (self._length, heads.kv_heads), (self._length, heads.kv_heads)
        parts = (torch.randn(*shape, heads.head_dim, generator=random) for shape in shapes)
        return _Drawn(*(part.to(self._device, self._dtype) for part in parts))

    def _batch(self, tokens: range, in_prompt: bool) -> tuple[CommonAttentionMetadata, Metadata]:
        """vLLM's metadata of the row with these new tokens, in all page tables, and what our layers get of it."""
        parts = [self._common(table, tokens, in_prompt) for table in self._tables]
        if self._groups is not None:
            for number, part in enumerate(parts):
                self._groups.keep(number, part)
        return parts[0], self._builder.metadata(parts[0], self._builder.batch(parts[0]))

    def _common(self, table: Tensor, tokens: range, in_prompt: bool) -> CommonAttentionMetadata:
        positions = torch.arange(tokens.start, tokens.stop, device=self._device)
        starts = torch.tensor([0, len(tokens)], dtype=torch.int32)
        length = torch.tensor([tokens.stop], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self._device),
            query_start_loc_cpu=starts,
            seq_lens=length.to(self._device),
            num_reqs=1,
            num_actual_tokens=len(tokens),
            max_query_len=len(tokens),
            max_seq_len=tokens.stop,
            block_table_tensor=table,
            slot_mapping=table[0].long()[positions // self._page] * self._page + positions % self._page,
            positions=positions,
            is_prefilling=torch.tensor([in_prompt]),
            seq_lens_cpu_upper_bound=length,
        )

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Without metrics: nobody asked for this row."""
        impls = [impl_of(layer) for layer in self._layers.values()]
        meters = [impl._meter for impl in impls]
        for impl in impls:
            impl._meter = None
        try:
            yield
        finally:
            for impl, meter in zip(impls, meters, strict=True):
                impl._meter = meter
