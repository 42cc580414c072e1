"""What keeps heads from having pages of their own (kv_memory=per_head)."""

from __future__ import annotations

from sparseserve import environment, vllm_version
from sparseserve.plugin.head_memory import poison
from sparseserve.plugin.support.configuration import Served
from sparseserve.plugin.support.refusal import Refusal
from sparseserve.vllm_version import PAGES_FIRST

SHARED = "serve with --set kv_memory=shared"


def _stages_of_heads(served: Served) -> object:
    stages = served.config.parallel_config.pipeline_parallel_size
    return served.policy.frees_pages and stages > 1 and stages


def _one_kind_of_pages(served: Served) -> object:
    return served.policy.frees_pages and served.config.scheduler_config.disable_hybrid_kv_cache_manager and "true"


def _retention(served: Served) -> object:
    return served.policy.frees_pages and served.config.cache_config.prefix_cache_retention_interval


def _layout(served: Served) -> object:
    layout = vllm_version.asked_layout()
    return served.policy.frees_pages and layout != PAGES_FIRST and layout


def _poison(served: Served) -> object:
    return served.policy.frees_pages and poison.ENABLED and vllm_version.engine_apart() and 1


HEAD_MEMORY: tuple[Refusal[Served], ...] = (
    Refusal(
        "pipeline parallelism with memory of heads",
        "--pipeline-parallel-size",
        _stages_of_heads,
        "1 with kv_memory = per_head: heads of all layers share pages",
        f"drop it, or {SHARED}",
        where="both",
    ),
    Refusal(
        "one kind of pages with memory of heads",
        "--disable-hybrid-kv-cache-manager",
        _one_kind_of_pages,
        "not set with kv_memory = per_head: vLLM would keep everything for every head",
        f"drop it, or {SHARED}",
        where="both",
    ),
    Refusal(
        "prefixes that are thinned out with memory of heads",
        "--prefix-cache-retention-interval",
        _retention,
        "0 with kv_memory = per_head: windows cache every full page until it is evicted",
        "drop it",
        where="both",
    ),
    Refusal(
        "other layouts with memory of heads",
        "VLLM_KV_CACHE_LAYOUT",
        _layout,
        f"{PAGES_FIRST}, or unset, with kv_memory = per_head: a page is one run of memory for all layers",
        f"unset it, or {SHARED}",
        where="both",
    ),
    Refusal(
        "poison in another process",
        environment.POISON,
        _poison,
        "unset, unless scheduler and worker share a process",
        "unset it, or set VLLM_ENABLE_V1_MULTIPROCESSING=0",
        where="both",
    ),
)
