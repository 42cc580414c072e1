"""vLLM's FlashAttention with decode rows under a policy, eager or in captured graphs.

A graph replays what one batch launched, so nothing of a step depends on values that the host would have to read. The
builder runs before every replay, outside the graph: it writes the step's buffers, which the graph reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.cache import CacheDType
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparseserve.decode.layer import decode_layer
from sparseserve.decode.step import StepBuffers
from sparseserve.decode.views import cuda_views
from sparseserve.errors import UnsupportedError
from sparseserve.plugin.backends.builder import Batch, SparseBuilder
from sparseserve.plugin.backends.layers import SparseBackend, SparseImpl, VllmLayer, bind_layers, extended, of_layer
from sparseserve.plugin.backends.rows import decode_rows, real_rows, rows_from
from sparseserve.plugin.backends.workspace import step_workspace
from sparseserve.plugin.head_memory.attention import GroupedStep, GroupedSteps
from sparseserve.plugin.settings import head_shape, model_shape, policy_of
from sparseserve.plugin.support.checks import check_worker, cuda_problems
from sparseserve.plugin.support.cuda import CUDA_HEAD_SIZES
from sparseserve.plugin.watch.meter import CudaMeter
from sparseserve.plugin.watch.recall import CudaRecall, Draw
from sparseserve.plugin.watch.requests import RowOptions
from sparseserve.policies import Policy
from sparseserve.types import HeadShape, NewTokens, PageTable, Step, on_device
from sparseserve.vllm_version import runner_of


class SparseCUDABackend(SparseBackend, FlashAttentionBackend):
    """CUSTOM: FLASH_ATTN, with the policy of `additional_config["sparseserve"]` on decode rows."""

    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SparseCUDAImpl]:
        return SparseCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[SparseCUDABuilder]:
        return SparseCUDABuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in CUDA_HEAD_SIZES

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A run of memory for every page and head is read fastest; both leave the tails of pages to us."""
        if cls.groups is None:
            return KVCacheLayout.LBHNC, KVCacheLayout.LBNHC
        return super().supported_kv_cache_layouts()

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


@dataclass
class SparseCUDAMetadata(FlashAttentionMetadata):
    """The parent's metadata where every row is the parent's, else the step of the first rows."""

    positions: Tensor | None = None  # [T] int64, of all query tokens
    step: Step | None = None  # of the decode rows, which come first; None: every row is the parent's
    rest: FlashAttentionMetadata | None = None  # of the rows after them


class SparseCUDABuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """Splits every batch into decode rows for the policy and rows for the parent."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int = 1
    supports_update_block_table: bool = False  # the step has the block table, too

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._grouped: GroupedSteps | None = None
        if (policy := policy_of(vllm_config)) is not None:
            self.bind(policy)

    def bind(self, policy: Policy) -> None:
        """Give every layer of this group its plan and allocate the step's buffers."""
        config = self.vllm_config
        check_worker(config)
        layers = get_layers_from_vllm_config(config, Attention, self.layer_names)
        heads = head_shape(next(iter(layers.values())))
        if problems := list(cuda_problems(config, policy, heads)):
            raise UnsupportedError(*problems)
        model = model_shape(config, heads, get_tensor_model_parallel_rank())
        plans = on_device(policy.plans(model), self.device)
        rows = config.scheduler_config.max_num_seqs
        self.follow(policy)
        self._model = model
        memory = step_workspace(config, policy, heads, self.device)
        self._buffers = StepBuffers(policy, plans, heads, rows, model.max_len, self.device, memory)
        mine = [plans[extract_layer_index(name)] for name in layers]
        runner = runner_of(config)
        self._recall = CudaRecall(policy, mine, self._buffers.measurement)
        self._meter = CudaMeter(policy, mine, len(plans), self.device, runner, config.parallel_config.rank)
        scratch = memory.scratch
        if groups := bind_layers(config, self.kv_cache_spec, layers, mine, policy, model, self._meter, scratch):
            self._grouped = GroupedSteps(groups, policy, self._buffers, self._of_prompts)

    def build(  # type: ignore[override]  # a GroupedStep is for layers of ours
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata | GroupedStep:
        common = common_attn_metadata
        if self._policy is None:
            return super().build(common_prefix_len, common, fast_build)
        self._recall.collect()
        batch = self.batch(real_rows(common))
        self._meter.report()
        self._count(batch, self._meter)
        draw = self._recall.draw() if batch.split.sparse.shape[0] else None
        if draw is not None:
            self._recall.expect(draw, batch.requests[: decode_rows(common)])
        return self.metadata(common, batch, draw, common_prefix_len, fast_build)

    def metadata(
        self,
        common: CommonAttentionMetadata,
        batch: Batch,
        draw: Draw | None = None,
        common_prefix_len: int = 0,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata | GroupedStep:
        """What the layers get of a batch; nothing is counted."""
        if self._grouped is not None:
            return self._grouped.build(common)
        rows = decode_rows(common)
        if batch.split.sparse.shape[0]:
            return self._metadata(common, self._step(common, rows, batch, draw))
        if rows == common.num_reqs:  # the runner may be about to replay a graph of decode rows, whatever is returned
            self._step(common, rows, batch, draw)
        parent = super().build(common_prefix_len, common, fast_build)
        return extended(SparseCUDAMetadata, parent, positions=common.positions)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata | GroupedStep:
        common = common_attn_metadata
        if self._grouped is not None:
            return self._grouped.build(common)
        if self._policy is None or decode_rows(common) < common.num_reqs:
            parent: FlashAttentionMetadata = super().build_for_cudagraph_capture(common)
            return parent
        return self._metadata(common, self._step(common, common.num_reqs, None, None))

    def _of_prompts(self, common: CommonAttentionMetadata, kv_heads: int) -> FlashAttentionMetadata:
        """The parent's metadata, for any number of KV heads.

        FA3 schedules for one number of heads, and vLLM keeps one such schedule of a batch; `fast_build` leaves it to
        each layer's launch.
        """
        return super().build(0, common, fast_build=True)

    def _step(self, common: CommonAttentionMetadata, rows: int, batch: Batch | None, draw: Draw | None) -> Step:
        seq_lens = common.seq_lens[:rows]
        whole, row_budget = self._apart(seq_lens, None if batch is None else batch.rows)
        assert common.is_prefilling is not None
        in_prompt = common.is_prefilling[:rows]  # runner V2 leaves out rows of padding
        if in_prompt.any():
            # A prompt's last chunk of one token runs as a decode: the answer must not depend on where chunks end.
            whole[: in_prompt.shape[0]] |= in_prompt.to(self.device, non_blocking=True)
        table = PageTable(common.block_table_tensor[:rows], seq_lens)
        measured = () if draw is None else draw.layers
        step = self._buffers.step(table, whole, row_budget, measured, launched=self._recall.layers)
        self.policy.prepare(step, self._model)
        return step

    def _apart(self, seq_lens: Tensor, apart: RowOptions | None) -> tuple[Tensor, Tensor | None]:
        """Which rows [B] attend to everything, and what their budgets are."""
        if apart is None:
            return seq_lens <= self.policy.dense_up_to, None
        numbers = torch.zeros(3, seq_lens.shape[0], dtype=torch.int32)
        real = min(len(apart.requests), numbers.shape[1])  # the others are padding
        for number, given in zip(numbers, (apart.dense_up_to, apart.dense, apart.row_budget), strict=True):
            number[:real] = given[:real]
        dense_up_to, dense, row_budget = numbers.to(self.device, non_blocking=True)
        return (seq_lens <= dense_up_to) | (dense != 0), row_budget

    def _metadata(self, common: CommonAttentionMetadata, step: Step) -> SparseCUDAMetadata:
        rows = step.table.seq_lens.shape[0]
        return SparseCUDAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            positions=common.positions,
            step=step,
            rest=super().build(0, rows_from(common, rows)) if rows < common.num_reqs else None,
        )


class SparseCUDAImpl(SparseImpl, FlashAttentionImpl):
    """One layer: the policy for the first rows, the parent for the others."""

    supports_dcp: bool = False
    can_return_lse_for_decode: bool = False

    backend = SparseCUDABackend
    views = staticmethod(cuda_views)

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.heads is not None:
            self._write_groups(self.heads, key, value, kv_cache, slot_mapping)
            return
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.policy is None or not self._page_state:
            return
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM warms up, without a token to keep
            return
        mine = of_layer(metadata, layer)
        assert isinstance(mine, SparseCUDAMetadata) and mine.positions is not None
        positions = mine.positions
        tokens = min(positions.shape[0], slot_mapping.shape[0])  # either may go on with padding
        new = NewTokens(slot_mapping[:tokens], positions[:tokens])
        self.policy.update_pages(self.bound(kv_cache), new)

    def forward(
        self,
        layer: VllmLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | GroupedStep | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None and self.backend.policy is not None:
            # vLLM measures how much memory it must leave beside the KV cache.
            heads = HeadShape(self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_size)
            step_workspace(self._config, self.backend.policy, heads, query.device)
        if isinstance(attn_metadata, GroupedStep):
            return self._forward_groups(layer, query, kv_cache, attn_metadata, output)
        if not isinstance(attn_metadata, SparseCUDAMetadata) or attn_metadata.step is None:
            parent: Any = attn_metadata  # vLLM takes None, and does not say so
            return super().forward(layer, query, key, value, kv_cache, parent, output, output_scale, output_block_scale)
        step = attn_metadata.step
        rows = step.table.seq_lens.shape[0]
        decode_layer(self.bound(kv_cache), step, query[:rows], output[:rows])
        if self._meter is not None:
            self._meter.count_tokens(step)
        if attn_metadata.rest is not None:
            super().forward(layer, query[rows:], key[rows:], value[rows:], kv_cache, attn_metadata.rest, output[rows:])
        return output
