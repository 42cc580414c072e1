"""Dense decode attention of others over the same pages, as far as it can be imported.

FlashInfer compiles its kernels at their first use, with nvcc and ninja, unless they lie in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.bench.gpu import byte_model
from kernels.bench.gpu.contenders import Check, output_check, outputs
from kernels.bench.gpu.layers import DTYPE, Layers
from kernels.bench.gpu.timing import Builders, Contender

Attention = Callable[[int, Tensor], object]  # of a layer, into an output [B, Hq, D]
FLOAT_WORKSPACE, XQA_WORKSPACE = 128 << 20, 256 << 20  # bytes, as their documentation and vLLM have them
VLLM_SPLITS = 32  # attention_config.flash_attn_max_num_splits_for_cuda_graph


def baseline(layers: Layers, make: Callable[[Layers], Attention], check: Check) -> Contender:
    """A contender that attends to everything."""
    attention, out = make(layers), outputs(layers)
    moved = byte_model.attend(layers.heads, layers.point.batch, layers.point.context)
    return Contender((moved,), lambda i: attention(i, out[i]), (out,), lambda: check(out[-1]))


def token_major(layers: Layers, i: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer as FlashAttention takes them, [M, P, H, D] of any strides."""
    kv = layers.kv(i)
    return kv.key.transpose(1, 2), kv.value.transpose(1, 2)


def flash_attention(layers: Layers) -> Attention:
    """vLLM's build of FlashAttention-3 or, without one, its own; the library chooses the splits."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return own_flash_attention(layers)
    return varlen(layers, flash_attn_varlen_func, num_splits=0)


def vllm_flash_attention(layers: Layers) -> Attention:
    """With the plan that vLLM makes once per step and the splits that it allows in CUDA graphs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    point, heads = layers.point, layers.heads
    plan = get_scheduler_metadata(
        batch_size=point.batch,
        max_seqlen_q=1,
        max_seqlen_k=point.context,
        num_heads_q=heads.query_heads,
        num_heads_kv=heads.kv_heads,
        headdim=heads.head_dim,
        cache_seqlens=layers.seq_lens,
        qkv_dtype=DTYPE,
        cu_seqlens_q=_starts(layers),
        page_size=point.page_size,
        causal=True,
        num_splits=VLLM_SPLITS,
    )
    return varlen(layers, flash_attn_varlen_func, num_splits=VLLM_SPLITS, scheduler_metadata=plan)


def varlen(layers: Layers, function: Callable[..., object], **options: object) -> Attention:
    """A call of `flash_attn_varlen_func`."""
    starts = _starts(layers)

    def call(i: int, out: Tensor) -> object:
        key, value = token_major(layers, i)
        return function(
            q=layers.query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=layers.seq_lens,
            max_seqlen_k=layers.point.context,
            softmax_scale=layers.scale,
            causal=True,
            block_table=layers.pages,
            fa_version=3,
            **options,
        )

    return call


def _starts(layers: Layers) -> Tensor:
    return torch.arange(layers.point.batch + 1, dtype=torch.int32, device=layers.device)


def own_flash_attention(layers: Layers) -> Attention:
    """FlashAttention-3's own package; it allocates its outputs, so each is copied, 8 KB a row."""
    from flash_attn_interface import flash_attn_with_kvcache

    def call(i: int, out: Tensor) -> None:
        key, value = token_major(layers, i)
        result = flash_attn_with_kvcache(
            layers.query[:, None],
            key,
            value,
            cache_seqlens=layers.seq_lens,
            page_table=layers.pages,
            softmax_scale=layers.scale,
            causal=True,
        )
        out.copy_(result[:, 0])

    return call


def flashinfer_decode(layers: Layers, tensor_cores: bool) -> Attention:
    """FlashInfer's wrapper, planned once: the layers share a page table."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    point, heads = layers.point, layers.heads
    workspace = torch.empty(FLOAT_WORKSPACE, dtype=torch.uint8, device=layers.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    per_row = layers.pages.shape[1]
    wrapper.plan(
        torch.arange(point.batch + 1, dtype=torch.int32) * per_row,
        layers.pages.flatten(),
        torch.full((point.batch,), point.page_size, dtype=torch.int32),
        heads.query_heads,
        heads.kv_heads,
        heads.head_dim,
        point.page_size,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
        sm_scale=layers.scale,
    )

    def call(i: int, out: Tensor) -> object:
        kv = layers.kv(i)
        return wrapper.run(layers.query, (kv.key, kv.value), out=out)

    return call


def xqa(layers: Layers) -> Attention:
    """TensorRT-LLM's decode kernel, in FlashInfer."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    workspace = torch.zeros(XQA_WORKSPACE, dtype=torch.uint8, device=layers.device)

    def call(i: int, out: Tensor) -> object:
        kv = layers.kv(i)
        return xqa_batch_decode_with_kv_cache(
            query=layers.query,
            kv_cache=(kv.key, kv.value),
            workspace_buffer=workspace,
            block_tables=layers.pages,
            seq_lens=layers.seq_lens,
            max_seq_len=layers.point.context,
            bmm1_scale=layers.scale,
            bmm2_scale=1.0,
            out=out,
            kv_layout="HND",
        )

    return call


MAKERS: dict[str, Callable[[Layers], Attention]] = {
    "FlashAttention-3": flash_attention,
    "FlashAttention-3 as in vLLM": vllm_flash_attention,
    "FlashInfer decode": partial(flashinfer_decode, tensor_cores=False),
    "FlashInfer decode, tensor cores": partial(flashinfer_decode, tensor_cores=True),
    "XQA": xqa,
}


def baselines(layers: Layers) -> Builders:
    """All of them; what cannot be imported says so when it is built."""
    check = output_check(layers, layers.everything())
    return {name: partial(baseline, layers, make, check) for name, make in MAKERS.items()}
