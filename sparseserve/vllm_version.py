"""What depends on vLLM's version, 0.32: all of its names that are private, or that other versions spell otherwise.

vLLM is imported only where it is asked, so that the version is known without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

VLLM_VERSION = "0.32."  # what the supported versions begin with
PAGES_FIRST = "BLHNC"  # the name of the layout in which the layers of a page are side by side
V1_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}  # environment; 0.33 calls V1 deprecated


def runner_of(config: VllmConfig) -> Literal["V1", "V2"]:
    """The model runner that vLLM takes: V2 where it can, which needs triton, on the CPU, too."""
    return "V2" if config.use_v2_model_runner else "V1"


def row_names(runner: RunnerV1 | RunnerV2, common: CommonAttentionMetadata) -> list[str]:
    """vLLM's ids of the requests behind a batch's rows, none for rows that nobody asked for.

    V1 keeps them in its `input_batch`. V2 has none: its metadata gives each row's place in the table `req_states`.
    """
    if common.req_idx is None:
        return runner.input_batch.req_ids if hasattr(runner, "input_batch") else []
    assert hasattr(runner, "req_states")
    names = runner.req_states.index_to_req_id
    return [names.get(int(index), "") for index in common.req_idx]


def model_dtype(config: VllmConfig) -> torch.dtype:
    """Of the numbers in the cache, too: no other is supported. It is a name only until vLLM has read the model."""
    return cast("torch.dtype", config.model_config.dtype)


def cpu_isa(config: VllmConfig) -> str:
    """How vLLM's CPU attention lays K out in a page, by a private function.

    It follows from the page size, which 0.33 settles only after the weights are loaded, unless --block-size gives it.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = config.model_config, config.cache_config
    isa: str = _get_attn_isa(model_dtype(config), cache.block_size, model.get_head_size(), cache.cache_dtype)
    return isa


def captures_cache_updates(config: VllmConfig) -> bool:
    """Whether runner V1 captures the writing of keys and values in piecewise graphs."""
    compilation = config.compilation_config
    piecewise = compilation.cudagraph_mode and compilation.cudagraph_mode.has_piecewise_cudagraphs()
    return bool(piecewise and runner_of(config) == "V1" and not compilation.splitting_ops_contain_kv_cache_update())


def asked_layout() -> str | None:
    """The layout that VLLM_KV_CACHE_LAYOUT asks for."""
    import vllm.envs as envs

    layout: str | None = envs.VLLM_KV_CACHE_LAYOUT
    return layout


def has_rust_frontend() -> bool:
    """Whether VLLM_USE_RUST_FRONTEND puts another server before the engine."""
    import vllm.envs as envs

    return bool(envs.VLLM_USE_RUST_FRONTEND)


def engine_apart() -> bool:
    """Whether the scheduler has a process of its own, as without VLLM_ENABLE_V1_MULTIPROCESSING=0."""
    import vllm.envs as envs

    return bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def is_quantized(cache_dtype: str) -> bool:
    """Whether a KV cache of this dtype holds quantized numbers."""
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    return bool(is_quantized_kv_cache(cache_dtype))
