"""Who looks for what: the launcher at arguments, configuration and plans, the worker at what it was given."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparseserve.errors import Problem
from sparseserve.footprint.planned import PlannedModel, plan_model
from sparseserve.ops.library import kernels
from sparseserve.plugin import settings
from sparseserve.plugin.support.arguments import ARGUMENTS, STARTED, Arguments, Started
from sparseserve.plugin.support.configuration import CACHE, FLAGS, PLANS, Planned, Served
from sparseserve.plugin.support.cuda import CUDA
from sparseserve.plugin.support.head_memory import HEAD_MEMORY
from sparseserve.plugin.support.models import LAYERS, MODELS, Layer, Model
from sparseserve.plugin.support.refusal import problems, refuse, this_platform
from sparseserve.policies import Policy
from sparseserve.types import HeadShape
from sparseserve.vllm_version import model_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl


def check_arguments(args: Namespace, platform: str) -> None:
    """Raise UnsupportedError with everything that is refused of the arguments of `vllm serve` on a platform."""
    refuse(problems(ARGUMENTS, Arguments(args, platform), platform))


def check_supported(config: VllmConfig, policy: Policy) -> None:
    """Raise UnsupportedError with everything that stands in the way of `policy`."""
    # Heads and pages of a model without ordinary attention mean nothing; the first reason explains the others.
    refuse([*problems(MODELS, Model(config.model_config))][:1])
    served, platform = Served(config, policy, settings.configured_heads(config)), this_platform()
    refuse(problems((*FLAGS, *CACHE, *CUDA, *HEAD_MEMORY), served, platform))
    if platform == "cuda":
        kernels("cuda")  # raises KernelsNotBuiltError


def plan_supported(config: VllmConfig, policy: Policy) -> PlannedModel:
    """The plans of every rank; ConfigError or UnsupportedError when the policy does not fit the layers."""
    model = settings.model_shape(config, settings.configured_heads(config))
    planned = plan_model(policy, model, model_dtype(config).itemsize)
    refuse(problems(PLANS, Planned(config, policy, planned.plans[0])))
    return planned


def check_worker(config: VllmConfig) -> None:
    """Raise UnsupportedError without our worker: what requests ask for would be lost, and nothing checked at start."""
    refuse(problems(STARTED, Started(config.parallel_config.worker_cls)))


def check_attention(name: str, impl: CPUAttentionBackendImpl | FlashAttentionImpl) -> None:
    """Raise UnsupportedError for attention that our kernels would compute as if it were plain softmax attention."""
    refuse(problems(LAYERS, Layer(name, impl)))


def group_problems(config: VllmConfig, policy: Policy) -> Iterator[Problem]:
    """What keeps heads from having pages of their own."""
    return problems(HEAD_MEMORY, Served(config, policy, settings.configured_heads(config)))


def cuda_problems(config: VllmConfig, policy: Policy, heads: HeadShape) -> Iterator[Problem]:
    """What the CUDA kernels, or steps that are captured in graphs, cannot do."""
    rows = (row for row in (*FLAGS, *CACHE, *CUDA) if row.where == "both")
    return problems(rows, Served(config, policy, heads), "cuda")
