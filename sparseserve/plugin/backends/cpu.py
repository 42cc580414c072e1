"""vLLM's CPU attention with decode rows under a policy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from sparseserve.decode.layer import decode_layer
from sparseserve.decode.step import StepBuffers
from sparseserve.decode.views import cpu_views
from sparseserve.plugin.backends.builder import Batch, SparseBuilder
from sparseserve.plugin.backends.layers import SparseBackend, SparseImpl, VllmLayer, bind_layers, extended, of_layer
from sparseserve.plugin.backends.rows import take_rows, token_rows
from sparseserve.plugin.head_memory.attention import GroupedStep, GroupedSteps
from sparseserve.plugin.settings import head_shape, model_shape, policy_of
from sparseserve.plugin.support.checks import check_worker
from sparseserve.plugin.watch.meter import Meter
from sparseserve.plugin.watch.recall import Draw, Recall, rows_of
from sparseserve.policies import Policy
from sparseserve.types import NewTokens, PageTable, Step


class SparseCPUBackend(SparseBackend, CPUAttentionBackend):
    """CPU_ATTN, with the policy of `additional_config["sparseserve"]` on decode rows."""

    @staticmethod
    def get_impl_cls() -> type[SparseCPUImpl]:
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SparseCPUBuilder]:
        return SparseCPUBuilder


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """The parent's metadata of the batch's dense rows, beside the step of its sparse rows."""

    positions: Tensor = field(kw_only=True)  # [T] int64, of all query tokens
    dense_tokens: Tensor | None = None  # [T] int64, None without dense rows
    sparse_tokens: Tensor | None = None  # [B] int64
    step: Step | None = None  # None: every row is the parent's


class SparseCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Splits every batch into rows for the parent and rows for the policy."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._grouped: GroupedSteps | None = None
        policy = policy_of(vllm_config)
        if policy is not None and not self.is_encoder_only_attention:
            self.bind(policy)

    def bind(self, policy: Policy) -> None:
        """Give every layer of this group its plan and allocate the step's buffers."""
        check_worker(self.vllm_config)
        if self.isa == "amx":  # AMX packs K in its own order; our kernels read "vec"
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        heads = head_shape(next(iter(layers.values())))
        model = model_shape(self.vllm_config, heads, get_tensor_model_parallel_rank())
        plans = policy.plans(model)
        config = self.vllm_config
        self.follow(policy)
        self._model = model
        self._buffers = StepBuffers(policy, plans, heads, config.scheduler_config.max_num_seqs, model.max_len)
        mine = [plans[extract_layer_index(name)] for name in layers]
        self._recall = Recall(policy, mine)
        self._meter = Meter(policy, mine, self._recall, config.parallel_config.rank)
        if groups := bind_layers(config, self.kv_cache_spec, layers, mine, policy, model, self._meter):
            self.reorder_batch_threshold = 1
            self._grouped = GroupedSteps(groups, policy, self._buffers, self._of_heads)

    def build(  # type: ignore[override]  # a GroupedStep is for layers of ours
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata | GroupedStep:
        common = common_attn_metadata
        if self._policy is None:
            return super().build(common_prefix_len, common, fast_build)
        batch = self.batch(common)
        self._count(batch, self._meter)
        draw = self._recall.draw() if batch.split.sparse.shape[0] else None
        if draw is not None:
            self._recall.expect(draw, rows_of(batch.requests, batch.split.sparse))
        return self.metadata(common, batch, draw, common_prefix_len, fast_build)

    def metadata(
        self,
        common: CommonAttentionMetadata,
        batch: Batch,
        draw: Draw | None = None,
        common_prefix_len: int = 0,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata | GroupedStep:
        """What the layers get of a batch; nothing is counted."""
        if self._grouped is not None:
            return self._grouped.build(common)
        assert common.positions is not None
        positions = common.positions[: common.num_actual_tokens]
        if not batch.split.sparse.shape[0]:
            parent = super().build(common_prefix_len, common, fast_build)
            return extended(SparseCPUMetadata, parent, positions=positions)
        return self._mixed(common, batch, draw, positions)

    def _mixed(
        self, common: CommonAttentionMetadata, batch: Batch, draw: Draw | None, positions: Tensor
    ) -> SparseCPUMetadata:
        split = batch.split
        sparse_tokens = common.query_start_loc_cpu[split.sparse].to(torch.int64)
        step = self._step(common, split.sparse, batch.row_budget, draw)
        if not split.dense.shape[0]:
            return SparseCPUMetadata(
                num_actual_tokens=common.num_actual_tokens,
                max_query_len=common.max_query_len,
                query_start_loc=common.query_start_loc,
                max_seq_len=common.max_seq_len,
                seq_lens=common.seq_lens,
                block_table=common.block_table_tensor,
                slot_mapping=common.slot_mapping,
                scheduler_metadata=None,  # no row is the parent's
                positions=positions,
                sparse_tokens=sparse_tokens,
                step=step,
            )
        dense_tokens = token_rows(common, split.dense)
        parent = super().build(0, take_rows(common, split.dense, dense_tokens))
        return extended(
            SparseCPUMetadata,
            parent,
            positions=positions,
            dense_tokens=dense_tokens,
            sparse_tokens=sparse_tokens,
            step=step,
        )

    def _of_heads(self, common: CommonAttentionMetadata, kv_heads: int) -> CPUAttentionMetadata:
        """The parent's metadata for some of a layer's KV heads."""
        all_heads = self.num_kv_heads, self.num_heads
        self.num_kv_heads, self.num_heads = kv_heads, kv_heads * (self.num_heads // self._model.heads.kv_heads)
        try:
            return super().build(0, common)
        finally:
            self.num_kv_heads, self.num_heads = all_heads

    def _step(
        self, common: CommonAttentionMetadata, rows: Tensor, row_budget: Tensor | None, draw: Draw | None
    ) -> Step:
        table = PageTable(common.block_table_tensor[rows], common.seq_lens[rows])
        own = None if row_budget is None else row_budget[rows]
        step = self._buffers.step(table, row_budget=own, measured=() if draw is None else draw.layers)
        self.policy.prepare(step, self._model)
        return step


class SparseCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """One layer: the parent for its rows, the policy for the others."""

    backend = SparseCPUBackend
    views = staticmethod(cpu_views)

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.heads is not None:
            self._write_groups(self.heads, key, value, kv_cache, slot_mapping)
            return
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.policy is not None and self._page_state:
            bound = self.bound(kv_cache)
            metadata = of_layer(get_forward_context().attn_metadata, layer)
            assert isinstance(metadata, SparseCPUMetadata)
            tokens = metadata.positions.shape[0]
            new = NewTokens(slot_mapping[:tokens], metadata.positions)
            self.policy.update_pages(bound, new)

    def forward(
        self,
        layer: VllmLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | GroupedStep | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if isinstance(attn_metadata, GroupedStep):
            return self._forward_groups(layer, query, kv_cache, attn_metadata, output)
        if not isinstance(attn_metadata, SparseCPUMetadata) or attn_metadata.step is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        step, sparse, dense = attn_metadata.step, attn_metadata.sparse_tokens, attn_metadata.dense_tokens
        assert sparse is not None
        if dense is None:
            rows = slice(sparse.shape[0])
            decode_layer(self.bound(kv_cache), step, query[rows], output[rows])
        else:
            dense_out = torch.empty_like(query[dense])
            super().forward(layer, query[dense], key, value, kv_cache, attn_metadata, dense_out)
            sparse_out = torch.empty_like(query[sparse])
            decode_layer(self.bound(kv_cache), step, query[sparse], sparse_out)
            output[dense], output[sparse] = dense_out, sparse_out
        if self._meter is not None:
            self._meter.count_tokens(step)
        return output
