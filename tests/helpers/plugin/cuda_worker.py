"""What a vLLM worker builds of the CUDA backend, on CPU tensors: layers, KV cache, metadata builder, batches."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output, unified_kv_cache_update
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    get_kv_cache_spec,
    init_attn_backend,
    init_kv_cache,
)
from vllm.v1.worker.workspace import current_workspace_manager

from sparseserve import ops
from sparseserve.config import WORKERS, to_dict
from sparseserve.decode.step import StepWorkspace
from sparseserve.model import ModelShape
from sparseserve.plugin.backends import cuda as backend_cuda
from sparseserve.plugin.backends import layers
from sparseserve.plugin.backends.cuda import SparseCUDABackend, SparseCUDABuilder, SparseCUDAImpl, SparseCUDAMetadata
from sparseserve.plugin.backends.layers import impl_of
from sparseserve.plugin.head_memory.attention import GroupedStep
from sparseserve.plugin.watch import meter
from sparseserve.plugin.watch.meter import CudaMeter
from sparseserve.plugin.watch.recall import CudaRecall
from sparseserve.policies import Policy
from sparseserve.types import HeadShape, Step

HEADS = HeadShape(kv_heads=2, queries_per_kv=2, head_dim=64)
PAGE, LAYERS, MAX_LEN, ROWS, POOL = 64, 3, 448, 8, 48
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HEADS.query_heads * HEADS.head_dim,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_LEN,
    "num_attention_heads": HEADS.query_heads,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS.kv_heads,
    "vocab_size": 320,
}


def vllm_config(folder: Path) -> VllmConfig:
    """What vLLM derives for a small Llama."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    args = EngineArgs(
        str(folder), skip_tokenizer_init=True, block_size=PAGE, max_num_seqs=ROWS, worker_cls=WORKERS["cuda"]
    )
    return args.create_engine_config()


def stand_in_for_flash_attention(patch: pytest.MonkeyPatch) -> None:
    """Plain torch in place of FlashAttention's two kernels, and no tensor parallelism."""
    patch.setattr(flash_attn, "reshape_and_cache_flash", _write, raising=False)
    patch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", _attend)
    for module in (backend_cuda, layers):
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)


def without_values(patch: pytest.MonkeyPatch) -> None:
    """For the device `meta`: no kernel runs, and nobody looks at what was counted or measured."""
    patch.setattr(ops, "kernels", lambda device: None)
    patch.setattr(CudaMeter, "report", lambda counted: None)
    patch.setattr(CudaRecall, "collect", lambda measured: None)
    patch.setattr(meter, "COUNTING", WeakSet())


def only_resource() -> StepWorkspace:
    """What the worker's workspace manager holds; vLLM has no public way to ask it for all."""
    (memory,) = current_workspace_manager()._persistent_resources[0].values()
    assert isinstance(memory, StepWorkspace)
    return memory


@dataclass
class Batch:
    """Rows of a step: their tokens with those of this step, the tokens of this step, and which are in their prompt."""

    lengths: list[int]
    new: list[int]
    in_prompt: list[bool] = field(default_factory=list)
    padding: int = 0  # rows that fill up a captured graph

    def metadata(self, pages: Tensor, device: str) -> CommonAttentionMetadata:
        """As runner V2 gives it: padding has length 0 and slot -1, and is missing from `is_prefilling`."""
        lengths = torch.tensor([*self.lengths, *[0] * self.padding], dtype=torch.int32)
        starts = torch.tensor([0, *self.new, *[0] * self.padding], dtype=torch.int32).cumsum(0).to(torch.int32)
        tokens = [range(length - new, length) for length, new in zip(self.lengths, self.new, strict=True)]
        positions = torch.tensor([position for row in tokens for position in row] + [0] * self.padding)
        slots = [int(pages[row, at // PAGE]) * PAGE + at % PAGE for row, span in enumerate(tokens) for at in span]
        return CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device),
            num_reqs=len(lengths),
            num_actual_tokens=len(positions),
            max_query_len=max(self.new),
            max_seq_len=max(self.lengths),
            block_table_tensor=pages[: len(lengths)].to(device),
            slot_mapping=torch.tensor(slots + [-1] * self.padding).to(device),
            positions=positions.to(device),
            is_prefilling=torch.tensor(self.in_prompt or [False] * len(self.lengths)),
            seq_lens_cpu_upper_bound=lengths,
        )


def step_of(metadata: FlashAttentionMetadata | GroupedStep) -> Step | None:
    """The step of a batch's decode rows, where heads are not grouped."""
    assert isinstance(metadata, SparseCUDAMetadata)
    return metadata.step


def attention_layers(config: VllmConfig, policy: Policy) -> list[Attention]:
    """The attention layers of the model, served under `policy`."""
    config.additional_config = {"sparseserve": to_dict(policy)}
    config.compilation_config.static_forward_context.clear()
    heads = HEADS.query_heads, HEADS.head_dim, HEADS.head_dim**-0.5, HEADS.kv_heads
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
    ours: dict[str, Any] = {"cache_config": config.cache_config, "attn_backend": SparseCUDABackend}
    with set_current_vllm_config(config):
        built = [Attention(*heads, prefix=name, **ours) for name in names]
    for impl in map(impl_of, built):
        assert isinstance(impl, SparseCUDAImpl)
        impl.vllm_flash_attn_version = 3
    return built


class Worker:
    """The backend's layers and builder under `policy`, with vLLM's own views of a padded cache."""

    def __init__(
        self, config: VllmConfig, policy: Policy, layout: str = "LBHNC", device: str = "cpu", patch: Any = None
    ) -> None:
        self.config, self.layers = config, attention_layers(config, policy)
        names = [layer.layer_name for layer in self.layers]
        plain = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=HEADS.kv_heads, head_size=HEADS.head_dim, dtype=torch.bfloat16
        )
        self.spec = SparseCUDABackend.customize_spec(plain)
        page = self.spec.page_size_bytes
        raw = torch.zeros(LAYERS * POOL * page, dtype=torch.int8, device=device)
        tensor = KVCacheTensor(size=len(raw), layers=names, layer_stride=POOL * page, block_stride=page)
        self.caches = create_kv_cache_views(raw, self.spec, POOL, KVCacheLayout[layout], tensor, PAGE)
        self.builder = SparseCUDABuilder(self.spec, names, config, torch.device(device))
        self.patch = patch

    def write(self, layer: int, metadata: Any, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write key and value [T, H, D] as vLLM does before attention."""
        module = self.layers[layer]
        context = SimpleNamespace(attn_metadata={module.layer_name: metadata})
        self.patch.setattr(backend_cuda, "get_forward_context", lambda: context)
        impl_of(module).do_kv_cache_update(module, key, value, self.caches[layer], slots)

    def forward(self, layer: int, metadata: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of `query` [T, Hq, D]; memory for the output is full of NaN."""
        module = self.layers[layer]
        out = torch.full_like(query, torch.nan)
        attended: Tensor = impl_of(module).forward(module, query, key, value, self.caches[layer], metadata, out)
        return attended


class GroupedWorker:
    """A worker whose heads are stored in groups, built by the functions of vLLM's runner V2.

    Its scheduler never reuses a page: row `row` of group `number` has the pages `tables[number, row]`.
    """

    def __init__(self, config: VllmConfig, policy: Policy, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        config.device_config.device = self.device
        self.layers = attention_layers(config, policy)
        for layer in self.layers:
            layer.process_weights_after_loading(torch.bfloat16)
        assert SparseCUDABackend.groups is not None
        self.groups = SparseCUDABackend.groups
        cache, self.context = config.cache_config, config.compilation_config.static_forward_context
        backends = dict.fromkeys(layer.get_attn_backend() for layer in self.context.values())
        cache.kv_cache_layout = get_supported_kv_cache_layouts(backends)[0].name
        shape = self.groups.tables.shape
        cache.num_gpu_blocks_override = shape.numel() + 1
        self.tables = 1 + torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(5)).view(shape).int()
        self.allocate()

    def allocate(self) -> None:
        """Allocate the pages and make the builders, as vLLM does once to profile its graphs and once to serve."""
        groups = get_kv_cache_groups(self.config, get_kv_cache_spec(self.config))
        self.kv = get_kv_cache_config_from_groups(self.config, groups, 0)
        self.config.cache_config.num_gpu_blocks = self.kv.num_blocks
        self.attention, self.graphs, sizes = init_attn_backend(self.kv, self.config, self.device)
        init_kv_cache(self.context, self.kv, self.device, sizes, self.config)
        self.numbers = [self.groups.names.index(group.layer_names[0]) for group in self.kv.kv_cache_groups]

    def build(self, batch: Batch, rows: list[int], capture: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Metadata and slots of every layer for a batch of `rows`, as runner V2 makes them."""
        tables = torch.nn.functional.pad(self.tables[:, rows], (0, 0, 0, batch.padding))
        parts = [batch.metadata(tables[number], self.device.type) for number in self.numbers]
        common, slots = parts[0], torch.stack([part.slot_mapping for part in parts])
        metadata = build_attn_metadata(
            attn_groups=self.attention,
            num_reqs=common.num_reqs,
            num_tokens=common.num_actual_tokens,
            query_start_loc_gpu=common.query_start_loc,
            query_start_loc_cpu=common.query_start_loc_cpu,
            max_query_len=common.max_query_len,
            seq_lens=common.seq_lens,
            max_seq_len=MAX_LEN if capture else common.max_seq_len,
            block_tables=[part.block_table_tensor for part in parts],
            slot_mappings=slots,
            kv_cache_config=self.kv,
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound,
            positions=common.positions,
            is_prefilling=common.is_prefilling,
            for_cudagraph_capture=capture,
        )
        return metadata, build_slot_mappings_by_layer(slots, self.kv)

    def write(self, slots: dict[str, Tensor], key: Tensor, value: Tensor) -> None:
        """Write key and value [L, T, H, D] and attend to nothing."""
        with override_forward_context(ForwardContext(self.context, {}, slots)):
            for layer, k, v in zip(self.layers, key, value, strict=True):
                impl_of(layer).do_kv_cache_update(layer, k, v, layer.kv_cache, slots[layer.layer_name])

    def run(self, metadata: Any, slots: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One pass of query [L, T, Hq, D], key and value [L, T, H, D]; memory for the output is full of NaN."""
        output = torch.full_like(query, torch.nan)
        with override_forward_context(ForwardContext(self.context, metadata, slots)):
            for layer, mine, k, v, out in zip(self.layers, query, key, value, output, strict=True):
                unified_kv_cache_update(k, v, layer.layer_name)
                unified_attention_with_output(mine, k, v, out, layer.layer_name)
        return output

    def spoil(self, row: int, length: int) -> None:
        """Fill the pages that a row frees once it has `length` tokens."""
        for number, window in enumerate(self.groups.storage.windows):
            if window is not None:
                first, end = window.sink_pages(PAGE), window.start(length + 1) // PAGE
                self.groups.pages[self.tables[number, row, first:end].long()] = torch.nan


def model_shape() -> ModelShape:
    """The model of CONFIG as policies see it."""
    return ModelShape("bed", LAYERS, HEADS, MAX_LEN, PAGE)


def _write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, *_: object) -> None:
    if slots.is_meta:
        return
    real = slots >= 0
    page, offset = slots[real] // PAGE, slots[real] % PAGE
    key_cache[page, offset], value_cache[page, offset] = key[: len(slots)][real], value[: len(slots)][real]


def _attend(*, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, **rest: Any) -> None:
    """Causal attention of rows of any length, from the arguments that FlashAttention gets."""
    if q.is_meta:
        return
    starts, lengths, pages = cu_seqlens_q.tolist(), rest["seqused_k"].tolist(), rest["block_table"]
    assert len(q) == starts[-1] and len(lengths) == len(pages) == len(starts) - 1
    for row, length in enumerate(lengths):
        mine = slice(starts[row], starts[row + 1])
        keys, values = (
            half[pages[row].long()].flatten(0, 1)[:length].repeat_interleave(HEADS.queries_per_kv, 1).transpose(0, 1)
            for half in (k, v)
        )
        seen = torch.arange(length) <= torch.arange(length - (starts[row + 1] - starts[row]), length)[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q[mine].transpose(0, 1), keys, values, attn_mask=seen, scale=rest["softmax_scale"]
        )
        out[mine] = mixed.transpose(0, 1)
