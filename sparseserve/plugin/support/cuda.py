"""What the CUDA kernels, or steps that are captured in graphs, cannot do."""

from __future__ import annotations

from sparseserve import vllm_version
from sparseserve.plugin.support.configuration import NEVER, Served, one_of
from sparseserve.plugin.support.refusal import WITHOUT_US, Refusal

CUDA_HEAD_SIZES = (64, 96, 128, 256)
CUDA_GROUP = 16  # query heads of a KV head, at most


def _cuda_dtype(served: Served) -> object:
    return served.dtype not in ("bfloat16", "float16") and served.dtype


def _cuda_head_size(served: Served) -> object:
    return served.heads.head_dim not in CUDA_HEAD_SIZES and served.heads.head_dim


def _cuda_group(served: Served) -> object:
    return served.heads.queries_per_kv > CUDA_GROUP and served.heads.queries_per_kv


def _odd_units(served: Served) -> object:
    unit = served.unit_tokens
    return unit & (unit - 1) and unit


def _waiting(served: Served) -> object:
    return served.switch and getattr(served.policy, served.switch)


def _microbatches(served: Served) -> object:
    return served.config.parallel_config.use_ubatching and "set"


def _captured_updates(served: Served) -> object:
    # V1 captures such graphs without the positions that summaries may need.
    return vllm_version.captures_cache_updates(served.config) and "without vllm::unified_kv_cache_update"


CUDA: tuple[Refusal[Served], ...] = (
    Refusal(
        "fp32",
        "--dtype",
        _cuda_dtype,
        "bfloat16 or float16 on CUDA",
        "give --dtype bfloat16",
        where="both",
        platform="cuda",
    ),
    Refusal(
        "heads of other sizes on CUDA",
        "head size",
        _cuda_head_size,
        f"{one_of(CUDA_HEAD_SIZES)} on CUDA",
        WITHOUT_US,
        where="both",
        platform="cuda",
    ),
    Refusal(
        "many query heads that share a KV head",
        "query heads of a KV head",
        _cuda_group,
        f"at most {CUDA_GROUP} on CUDA",
        WITHOUT_US,
        where="both",
        platform="cuda",
    ),
    Refusal(
        "units that CUDA cannot halve",
        "tokens of a unit",
        _odd_units,
        "a power of two on CUDA",
        "take gates of other blocks, or another policy",
        where="both",
        platform="cuda",
    ),
    Refusal(
        "policies that wait for the host",
        "{switch}",
        _waiting,
        "false on CUDA, where a step cannot wait for the host",
        "give --set {switch}=false",
        where="both",
        platform="cuda",
    ),
    Refusal(
        "dual batch overlap",
        "--enable-dbo",
        _microbatches,
        NEVER,
        "drop --enable-dbo",
        where="both",
        platform="cuda",
    ),
    Refusal(
        "graphs that write keys and values",
        "--compilation-config.splitting_ops",
        _captured_updates,
        "the default, which splits at KV cache updates",
        "drop it, and use_inductor_graph_partition",
        where="both",
        platform="cuda",
    ),
)
