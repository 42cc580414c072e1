"""From vLLM's configuration to ours."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import vllm.envs as envs
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.kv_cache_interface import is_quantized_kv_cache
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparseserve import environment
from sparseserve.config import ADDITIONAL_CONFIG, from_dict
from sparseserve.errors import Problem, UnsupportedError
from sparseserve.model import ModelShape
from sparseserve.plugin.head_memory import poison
from sparseserve.policies import Policy
from sparseserve.types import HeadShape

if TYPE_CHECKING:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

CUDA_HEAD_SIZES = (64, 96, 128, 256)
PAGES_FIRST = KVCacheLayout.BLHNC.name
CUDA_GROUP = 16  # query heads of a KV head, at most
WITHOUT_US = "serve this model without additional_config.sparseserve"


def policy_of(vllm_config: VllmConfig | Namespace) -> Policy | None:
    """The policy that `additional_config["sparseserve"]` asks for; None leaves vLLM as it is."""
    config = vllm_config.additional_config
    settings = config.get(ADDITIONAL_CONFIG) if isinstance(config, Mapping) else None
    return None if settings is None else from_dict(settings)


def head_shape(layer: Attention) -> HeadShape:
    """The heads of an attention layer on this rank."""
    return HeadShape(layer.num_kv_heads, layer.num_heads // layer.num_kv_heads, layer.head_size)


def model_shape(vllm_config: VllmConfig, heads: HeadShape, rank: int = 0) -> ModelShape:
    """The served model as policies see it on a tensor-parallel rank."""
    model = vllm_config.model_config
    config = Path(model.model) / "config.json"
    return ModelShape(
        name=model.model,
        layers=model.get_total_num_hidden_layers(),
        heads=heads,
        max_len=model.max_model_len,
        page_size=vllm_config.cache_config.block_size,
        rank=rank,
        ranks=vllm_config.parallel_config.tensor_parallel_size,
        rope=lambda dim: rope_table(vllm_config, dim),
        config_sha256=hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
    )


def rope_table(vllm_config: VllmConfig, head_dim: int) -> Tensor:
    """cos and sin [max_len, head_dim] fp32 of the model's rotary embedding, at another head dim if need be.

    Raises UnsupportedError for embeddings that are not plain rotations of halves over the whole head.
    """
    model = vllm_config.model_config
    parameters = getattr(model.hf_text_config, "rope_parameters", None)
    if not parameters:
        allowed = "a model with rotary position embedding"
        raise UnsupportedError(Problem("model", model.model, allowed, remedy="take a policy without gates"))
    with set_current_vllm_config(vllm_config, check_compile=False):
        rope = get_rope(head_dim, model.max_model_len, rope_parameters=parameters, dtype=torch.float32)
    if rope.rotary_dim != head_dim or not rope.is_neox_style or rope.cos_sin_cache.dim() != 2:
        allowed = "a rotary embedding of the whole head, in halves"
        raise UnsupportedError(Problem("rope_parameters", parameters, allowed, remedy="take a policy without gates"))
    return rope.cos_sin_cache[: model.max_model_len].float()


def check_attention(name: str, impl: CPUAttentionBackendImpl | FlashAttentionImpl) -> None:
    """Raise UnsupportedError for attention that our kernels would compute as if it were plain softmax attention."""
    extras = {
        "sliding window": impl.sliding_window not in (-1, (-1, -1)),
        "ALiBi": impl.alibi_slopes is not None,
        "capped logits": impl.logits_soft_cap != 0,
        "attention sinks": impl.sinks is not None,
        "quantized KV cache": is_quantized_kv_cache(impl.kv_cache_dtype),
    }
    if found := [extra for extra, there in extras.items() if there]:
        raise UnsupportedError(Problem(name, " and ".join(found), "plain softmax attention", remedy=WITHOUT_US))


def page_problems(vllm_config: VllmConfig, policy: Policy) -> Iterator[Problem]:
    """Pages that do not hold whole units."""
    page, unit = vllm_config.cache_config.block_size, policy.selection_unit
    if policy.selection_units(vllm_config.model_config.max_model_len) and page % unit:
        allowed = f"a multiple of {unit}, the unit_tokens of {policy.name}"
        yield Problem("--block-size", page, allowed, remedy=f"give --block-size {-(-page // unit) * unit}")


def group_problems(vllm_config: VllmConfig, policy: Policy) -> Iterator[Problem]:
    """What keeps heads from having pages of their own."""
    if not policy.frees_pages:
        return
    stages, layout = vllm_config.parallel_config.pipeline_parallel_size, envs.VLLM_KV_CACHE_LAYOUT
    shared = "serve with --set kv_memory=shared"
    if stages > 1:
        allowed = "1 with kv_memory = per_head: heads of all layers share pages"
        yield Problem("--pipeline-parallel-size", stages, allowed, remedy=f"drop it, or {shared}")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        allowed = "not set with kv_memory = per_head: vLLM would keep everything for every head"
        yield Problem("--disable-hybrid-kv-cache-manager", "true", allowed, remedy=f"drop it, or {shared}")
    if interval := vllm_config.cache_config.prefix_cache_retention_interval:
        allowed = "0 with kv_memory = per_head: windows cache every full page until it is evicted"
        yield Problem("--prefix-cache-retention-interval", interval, allowed, remedy="drop it")
    if layout not in (None, PAGES_FIRST):
        allowed = f"{PAGES_FIRST}, or unset, with kv_memory = per_head: a page is one run of memory for all layers"
        yield Problem("VLLM_KV_CACHE_LAYOUT", layout, allowed, remedy=f"unset it, or {shared}")
    if poison.ENABLED and envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        allowed = "unset, unless scheduler and worker share a process"
        yield Problem(environment.POISON, 1, allowed, remedy="unset it, or set VLLM_ENABLE_V1_MULTIPROCESSING=0")


def cuda_problems(vllm_config: VllmConfig, policy: Policy, heads: HeadShape) -> Iterator[Problem]:
    """What the CUDA kernels, or steps that are captured in graphs, cannot do."""
    yield from page_problems(vllm_config, policy)
    dtype, parallel = vllm_config.model_config.dtype, vllm_config.parallel_config
    if dtype not in (torch.bfloat16, torch.float16):
        allowed = "bfloat16 or float16 on CUDA"
        yield Problem("--dtype", str(dtype).removeprefix("torch."), allowed, remedy="give --dtype bfloat16")
    if heads.head_dim not in CUDA_HEAD_SIZES:
        allowed = f"one of {', '.join(map(str, CUDA_HEAD_SIZES))} on CUDA"
        yield Problem("head size", heads.head_dim, allowed, remedy=WITHOUT_US)
    if heads.queries_per_kv > CUDA_GROUP:
        allowed = f"at most {CUDA_GROUP} on CUDA"
        yield Problem("query heads of a KV head", heads.queries_per_kv, allowed, remedy=WITHOUT_US)
    if (unit := policy.selection_unit) & (unit - 1):
        yield Problem(
            "tokens of a unit", unit, "a power of two on CUDA", remedy="take gates of other blocks, or another policy"
        )
    if switch := policy.host_bound:
        allowed = "false on CUDA, where a step cannot wait for the host"
        yield Problem(switch, getattr(policy, switch), allowed, remedy=f"give --set {switch}=false")
    refused = {
        "--speculative-config": vllm_config.speculative_config and vllm_config.speculative_config.method,
        "--enable-dbo": parallel.use_ubatching and "set",
    }
    for flag, value in refused.items():
        if value:
            yield Problem(flag, value, "none: it cannot be combined with a policy", remedy=f"drop {flag}")
    compilation = vllm_config.compilation_config
    piecewise = compilation.cudagraph_mode and compilation.cudagraph_mode.has_piecewise_cudagraphs()
    if piecewise and not vllm_config.use_v2_model_runner and not compilation.splitting_ops_contain_kv_cache_update():
        # V1 captures such graphs without the positions that summaries may need.
        key, value = "--compilation-config.splitting_ops", "without vllm::unified_kv_cache_update"
        remedy = "drop it, and use_inductor_graph_partition"
        yield Problem(key, value, "the default, which splits at KV cache updates", remedy=remedy)
