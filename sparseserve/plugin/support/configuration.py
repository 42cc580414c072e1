"""What is refused of a configuration that vLLM derived: flags, heads, pages, the context, and plans made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseserve import vllm_version
from sparseserve.plugin.support.refusal import USE_VLLM, Refusal, Subject, this_platform
from sparseserve.policies import Policy
from sparseserve.types import HeadShape, LayerPlan, Role

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
CPU_ISAS = ("vec", "vec16", "amx")  # how vLLM lays K out in a page; under "amx" the plugin switches to "vec"
PLATFORMS = ("cpu", "cuda")
NEVER = "none: it cannot be combined with a policy"


@dataclass(frozen=True, slots=True)
class Served(Subject):
    """A policy under a configuration."""

    config: VllmConfig
    policy: Policy
    heads: HeadShape  # of one rank

    @property
    def dtype(self) -> str:
        """Of the model's numbers."""
        return str(self.config.model_config.dtype).removeprefix("torch.")

    @property
    def whole_cache(self) -> bool:
        """Whether the cache holds numbers as the model computes them."""
        return self.config.cache_config.cache_dtype in ("auto", self.dtype)

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit."""
        return self.policy.selection_unit

    @property
    def whole_units(self) -> int:
        """The next page size that holds whole units."""
        page: int = self.config.cache_config.block_size
        return -(-page // self.unit_tokens) * self.unit_tokens

    @property
    def dense_up_to(self) -> int:
        """The longest row, in tokens, in which the policy never acts."""
        return self.policy.dense_up_to

    @property
    def switch(self) -> str:
        """The policy's parameter that makes steps wait for the host."""
        return self.policy.host_bound


@dataclass(frozen=True, slots=True)
class Planned(Subject):
    """A policy's plans under a configuration."""

    config: VllmConfig
    policy: Policy
    plans: Sequence[LayerPlan]


def _cpu_head_size(served: Served) -> object:
    return served.heads.head_dim not in HEAD_SIZES and served.heads.head_dim


def _unlike_layers(served: Served) -> object:
    model = served.config.model_config
    return model.model_arch_config.per_layer_overrides and model.model


def _speculation(served: Served) -> object:
    speculative = served.config.speculative_config
    return speculative and speculative.method


def _connector(served: Served) -> object:
    transfer, offloading = served.config.kv_transfer_config, served.config.cache_config.kv_offloading_size
    return offloading is None and transfer and transfer.kv_connector


def _offloading(served: Served) -> object:
    transfer, offloading = served.config.kv_transfer_config, served.config.cache_config.kv_offloading_size
    return offloading is not None and transfer and transfer.kv_connector


def _decode_contexts(served: Served) -> object:
    return served.config.parallel_config.decode_context_parallel_size > 1 and "set"


def _prefill_contexts(served: Served) -> object:
    return served.config.parallel_config.prefill_context_parallel_size > 1 and "set"


def _other_platform(_: Served) -> object:
    return (platform := this_platform()) not in PLATFORMS and platform


def _rust_frontend(_: Served) -> object:
    return vllm_version.has_rust_frontend() and 1


def _short_context(served: Served) -> object:
    longest = served.config.model_config.max_model_len
    return served.policy.is_sparse and longest <= served.dense_up_to and longest


def _cache_dtype(served: Served) -> object:
    return not served.whole_cache and served.config.cache_config.cache_dtype


def _split_units(served: Served) -> object:
    page, longest = served.config.cache_config.block_size, served.config.model_config.max_model_len
    return served.policy.selection_units(longest) and page % served.unit_tokens and page


def _cpu_isa(served: Served) -> object:
    return served.whole_cache and (isa := vllm_version.cpu_isa(served.config)) not in CPU_ISAS and isa


def _reuse_of_other_stages(planned: Planned) -> object:
    stages = planned.config.parallel_config.pipeline_parallel_size
    return stages > 1 and any(plan.role is Role.REUSE for plan in planned.plans) and stages


def one_of(names: Sequence[object]) -> str:
    """Names, as people are told them."""
    return f"one of {', '.join(map(str, names))}"


FLAGS: tuple[Refusal[Served], ...] = (
    Refusal("heads of other sizes", "head size", _cpu_head_size, one_of(HEAD_SIZES), USE_VLLM, platform="cpu"),
    Refusal("layers with unlike heads", "model", _unlike_layers, "the same heads in every layer", USE_VLLM),
    Refusal(
        "speculative decoding", "--speculative-config", _speculation, NEVER, "drop --speculative-config", where="both"
    ),
    Refusal(
        "KV connectors",
        "--kv-transfer-config",
        _connector,
        NEVER,
        "drop --kv-transfer-config",
    ),
    Refusal(
        "KV offloading",
        "--kv-offloading-size",
        _offloading,
        NEVER,
        "drop --kv-offloading-size",
    ),
    Refusal(
        "context parallelism in decode",
        "--decode-context-parallel-size",
        _decode_contexts,
        NEVER,
        "drop --decode-context-parallel-size",
    ),
    Refusal(
        "context parallelism in prompts",
        "--prefill-context-parallel-size",
        _prefill_contexts,
        NEVER,
        "drop --prefill-context-parallel-size",
    ),
    Refusal(
        "other platforms",
        "platform",
        _other_platform,
        "cpu or cuda",
        "install sparseserve[cpu] or sparseserve[cuda]",
    ),
    Refusal(
        "the Rust front end",
        "VLLM_USE_RUST_FRONTEND",
        _rust_frontend,
        "unset: the Rust front end loads no endpoint plugins, so our metrics would be missing",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
)
CACHE: tuple[Refusal[Served], ...] = (
    Refusal(
        "contexts in which the policy never acts",
        "--max-model-len",
        _short_context,
        "more than {dense_up_to}: up to there {policy} attends to everything",
        "give longer contexts, or set min_tokens and the budget lower",
    ),
    Refusal(
        "a KV cache of another dtype, such as fp8",
        "--kv-cache-dtype",
        _cache_dtype,
        "auto or {dtype}",
        "give --kv-cache-dtype {dtype}",
    ),
    Refusal(
        "pages that split units",
        "--block-size",
        _split_units,
        "a multiple of {unit_tokens}, the unit_tokens of {policy}",
        "give --block-size {whole_units}",
        where="both",
    ),
    Refusal(
        "CPUs other than x86-64",
        "CPU attention ISA",
        _cpu_isa,
        one_of(CPU_ISAS),
        "use an x86-64 machine",
        platform="cpu",
    ),
)
PLANS: tuple[Refusal[Planned], ...] = (
    Refusal(
        "reuse across pipeline stages",
        "--pipeline-parallel-size",
        _reuse_of_other_stages,
        "1 with {policy}, whose layers reuse the selection of another layer",
        "drop --pipeline-parallel-size, or take quest, which selects in every layer",
    ),
)
