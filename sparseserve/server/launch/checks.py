"""Everything that is checked before the engine starts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from sparseserve.config import PolicySource
from sparseserve.errors import ConfigError
from sparseserve.footprint.planned import PlannedModel
from sparseserve.plugin.support.checks import check_arguments, check_supported, plan_supported
from sparseserve.plugin.support.refusal import this_platform
from sparseserve.server.launch.flags import engine_config, parse, platform_flags, policy_flags, server_flags

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class Checked:
    """A server that passed every check."""

    argv: list[str]  # with what the policy adds
    args: argparse.Namespace  # the same, as vLLM reads it
    config: VllmConfig
    planned: PlannedModel


def check(source: PolicySource, argv: list[str], args: argparse.Namespace) -> Checked:
    """Check a policy against `argv`, the arguments of `vllm serve`, which vLLM reads as `args`."""
    platform = this_platform()
    check_arguments(args, platform)
    policy = source.policy(args.model)
    added = policy_flags(policy, args, platform), server_flags(policy, args), platform_flags(policy, args, platform)
    argv = [*argv, *chain.from_iterable(added)]
    args = parse(argv)
    config = engine_config(args)
    check_supported(config, policy)
    try:
        planned = plan_supported(config, policy)
    except ConfigError as error:
        raise source.locate(error, args.model) from None
    return Checked(argv, args, config, planned)
