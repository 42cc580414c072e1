"""What a policy cannot be combined with, told from vLLM's configuration before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import vllm.envs as envs
from vllm.platforms import current_platform

from sparseserve.errors import Problem, UnsupportedError
from sparseserve.model import ModelShape
from sparseserve.ops.library import kernels
from sparseserve.plugin import settings
from sparseserve.policies import Policy
from sparseserve.types import HeadShape, LayerPlan, Role

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
CPU_ISAS = ("vec", "vec16", "amx")  # how vLLM lays K out in a page; under "amx" the plugin switches to "vec"
FULL_ATTENTION = {"attention", "full_attention"}
USE_VLLM = "serve this model with vLLM itself"


def model_shape(config: VllmConfig) -> ModelShape:
    """The model as the policies see it, with the heads of one rank."""
    return settings.model_shape(config, _head_shape(config))


def model_dtype(config: VllmConfig) -> torch.dtype:
    """Of the numbers in the cache, too: no other is supported."""
    return cast("torch.dtype", config.model_config.dtype)  # a name only until vLLM has read the model


def check_supported(config: VllmConfig, policy: Policy) -> None:
    """Raise UnsupportedError with everything that stands in the way of `policy`."""
    # Heads and pages of a model without ordinary attention mean nothing.
    problems = list(_model(config.model_config)) or [
        *_heads(config),
        *_flags(config),
        *_context(config.model_config, policy),
        *_cache(config, policy),
        *settings.group_problems(config, policy),
    ]
    if problems:
        raise UnsupportedError(*dict.fromkeys(problems))  # some checks are the plugin's, too
    if current_platform.is_cuda():
        kernels("cuda")  # raises KernelsNotBuiltError


def plan_layers(config: VllmConfig, policy: Policy, shape: ModelShape) -> tuple[LayerPlan, ...]:
    """The plan of every layer; ConfigError or UnsupportedError when the policy does not fit the layers."""
    plans = policy.plans(shape)
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1 and any(plan.role is Role.REUSE for plan in plans):
        remedy = "drop --pipeline-parallel-size, or take quest, which selects in every layer"
        allowed = f"1 with {policy.name}, whose layers reuse the selection of another layer"
        raise UnsupportedError(Problem("--pipeline-parallel-size", stages, allowed, remedy=remedy))
    return plans


def _model(model: ModelConfig) -> Iterator[Problem]:
    def refuse(what: str, allowed: str, remedy: str = USE_VLLM) -> Problem:
        return Problem("model", f"{model.model} ({what})", allowed, remedy=remedy)

    if model.runner_type != "generate":
        yield Problem("--runner", model.runner_type, "generate: only decoding reads the KV cache", remedy=USE_VLLM)
    elif model.use_mla:
        yield refuse("MLA", "attention with separate keys and values (MHA, GQA, MQA)")
    elif model.attn_type != "decoder" or model.has_noops:
        what = model.attn_type if model.attn_type != "decoder" else "layers without attention"
        yield refuse(what.replace("_", " "), "decoder-only attention in every layer")
    elif layers := _windowed(model):
        remedy = "add --disable-sliding-window, which limits the context to the window"
        yield refuse(layers, "full attention in every layer", remedy)
    elif model.uses_alibi or getattr(model.hf_text_config, "attn_logit_softcapping", None):
        yield refuse("ALiBi or capped logits", "plain softmax attention")


def _windowed(model: ModelConfig) -> str:
    window = model.get_sliding_window()
    layers = set(getattr(model.hf_text_config, "layer_types", None) or ()) - FULL_ATTENTION
    if model.disable_sliding_window:
        layers.discard("sliding_attention")
    return " and ".join(sorted(layers)) or (f"sliding window of {window} tokens" if window else "")


def _head_shape(config: VllmConfig) -> HeadShape:
    model, parallel = config.model_config, config.parallel_config
    kv_heads = model.get_num_kv_heads(parallel)
    return HeadShape(kv_heads, model.get_num_attention_heads(parallel) // kv_heads, model.get_head_size())


def _heads(config: VllmConfig) -> Iterator[Problem]:
    model = config.model_config
    if current_platform.is_cpu() and model.get_head_size() not in HEAD_SIZES:
        yield Problem("head size", model.get_head_size(), f"one of {', '.join(map(str, HEAD_SIZES))}", remedy=USE_VLLM)
    if model.model_arch_config.per_layer_overrides:
        yield Problem("model", model.model, "the same heads in every layer", remedy=USE_VLLM)


def _flags(config: VllmConfig) -> Iterator[Problem]:
    parallel = config.parallel_config
    connector = "--kv-transfer-config" if config.cache_config.kv_offloading_size is None else "--kv-offloading-size"
    refused = {
        "--speculative-config": config.speculative_config and config.speculative_config.method,
        connector: config.kv_transfer_config and config.kv_transfer_config.kv_connector,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size - 1 and "set",
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size - 1 and "set",
    }
    for flag, value in refused.items():
        if value:
            yield Problem(flag, value, "none: it cannot be combined with a policy", remedy=f"drop {flag}")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        remedy = "install sparseserve[cpu] or sparseserve[cuda]"
        yield Problem("platform", current_platform.device_name, "cpu or cuda", remedy=remedy)
    if envs.VLLM_USE_RUST_FRONTEND:
        allowed = "unset: the Rust front end loads no endpoint plugins, so our metrics would be missing"
        yield Problem("VLLM_USE_RUST_FRONTEND", 1, allowed, remedy="unset VLLM_USE_RUST_FRONTEND")


def _context(model: ModelConfig, policy: Policy) -> Iterator[Problem]:
    if policy.is_sparse and model.max_model_len <= policy.dense_up_to:
        allowed = f"more than {policy.dense_up_to}: up to there {policy.name} attends to everything"
        remedy = "give longer contexts, or set min_tokens and the budget lower"
        yield Problem("--max-model-len", model.max_model_len, allowed, remedy=remedy)


def _cache(config: VllmConfig, policy: Policy) -> Iterator[Problem]:
    cache = config.cache_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", dtype):
        remedy = f"give --kv-cache-dtype {dtype}"
        yield Problem("--kv-cache-dtype", cache.cache_dtype, f"auto or {dtype}", remedy=remedy)
        return
    yield from settings.page_problems(config, policy)
    if current_platform.is_cuda():
        yield from settings.cuda_problems(config, policy, _head_shape(config))
    if current_platform.is_cpu() and (isa := _isa(config)) not in CPU_ISAS:
        yield Problem("CPU attention ISA", isa, f"one of {', '.join(CPU_ISAS)}", remedy="use an x86-64 machine")


def _isa(config: VllmConfig) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = config.model_config, config.cache_config
    return _get_attn_isa(model_dtype(config), cache.block_size, model.get_head_size(), cache.cache_dtype)
