"""The arguments of `vllm serve`: read as vLLM reads them, and what a policy adds to them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from itertools import chain
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from sparseserve import environment
from sparseserve.config import ADDITIONAL_CONFIG, to_dict
from sparseserve.errors import ConfigError, SparseServeError
from sparseserve.plugin.support.arguments import worker_on
from sparseserve.policies import Policy
from sparseserve.request_options import aliases, own_names

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OUR_PLUGINS = ["sparseserve", "sparseserve_front", "sparseserve_metrics", "sparseserve_routes"]
ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
DRAIN_TIMEOUT = 30  # seconds; vLLM's own 0 cuts running answers
CUDA_PAGE = 64  # tokens, at least; vLLM's 16 hold no unit of most policies


@contextmanager
def vllm_errors() -> Iterator[None]:
    """vLLM's own message without the traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise SparseServeError(f"vLLM refuses this configuration: {error}") from error


@vllm_errors()
def parse(argv: list[str]) -> argparse.Namespace:
    """vLLM's own parser of `vllm serve`, whose console script some builds of vLLM cannot start."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    new_parser: Callable[..., Any] = FlexibleArgumentParser
    parser = new_parser(prog="vllm")
    serve_command = ServeSubcommand()
    serve_command.subparser_init(parser.add_subparsers(dest="subparser")).set_defaults(shutdown_timeout=DRAIN_TIMEOUT)
    args: argparse.Namespace = parser.parse_args(["serve", *argv])
    configure_logging_from_args(args)
    serve_command.validate(args)
    args.model = args.model_tag or args.model
    return args


@vllm_errors()
def engine_config(args: argparse.Namespace) -> VllmConfig:
    """The configuration that vLLM derives; reads the model's config.json, not its weights."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    config: VllmConfig = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    return config


def policy_flags(policy: Policy, args: argparse.Namespace, platform: str) -> list[str]:
    """What to add to `vllm serve`; the user's own additional_config stays."""
    settings = {**args.additional_config, ADDITIONAL_CONFIG: to_dict(policy)}
    # One dotted flag per key, all of them: vLLM lets dotted flags win over a JSON one.
    pairs = [[f"--additional-config.{key}", json.dumps(value)] for key, value in settings.items()]
    return [*chain.from_iterable(pairs), "--worker-cls", worker_on(platform)]


def server_flags(policy: Policy, args: argparse.Namespace) -> list[str]:
    """What to add for the API server: time to drain, and aliases of the served models after the user's own names."""
    names = own_names(args.served_model_name or [args.model], policy)
    listed = dict.fromkeys([*names, *chain.from_iterable(aliases(name, policy) for name in names)])
    return ["--shutdown-timeout", str(args.shutdown_timeout), "--served-model-name", *listed]


def platform_flags(policy: Policy, args: argparse.Namespace, platform: str) -> list[str]:
    """What to add on CUDA: our backend for full attention, and pages of whole units unless the user gave a size."""
    return cuda_flags(policy, args) if platform == "cuda" else []


def cuda_flags(policy: Policy, args: argparse.Namespace) -> list[str]:
    """`platform_flags` on CUDA."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    given = args.attention_config
    settings = {field.name: getattr(given, field.name) for field in fields(given)}
    changed = {key: value for key, value in settings.items() if value != getattr(type(given)(), key)}
    changed["backend_per_kind"] = {**given.backend_per_kind, "full_attention": AttentionBackendEnum.CUSTOM}
    # One dotted flag per key, as above; backends go by their names.
    pairs = [
        [f"--attention-config.{key}", json.dumps(value, default=lambda backend: backend.name)]
        for key, value in changed.items()
    ]
    if not args.block_size:
        pairs.append(["--block-size", str(-(-CUDA_PAGE // policy.selection_unit) * policy.selection_unit)])
    return [*chain.from_iterable(pairs)]


def check_metrics_folder(args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """ConfigError when the folder in which several processes share metrics cannot be written."""
    several = (args.api_server_count or args.data_parallel_size) > 1
    names = [environment.PROMETHEUS, *([environment.TEMPORARY] if several else [])]
    name = next((name for name in names if env.get(name)), None)
    if name is None:
        return
    try:
        with TemporaryFile(dir=env[name]):
            pass
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror}): processes share their metrics in it"
        remedy = f"make it, or change its owner; or unset {name}"
        raise ConfigError(name, env[name], allowed, remedy=remedy) from None


def allowed_plugins(env: Mapping[str, str]) -> list[str]:
    """VLLM_PLUGINS with our plugins in it: it is an allow-list, so what loads without it must be named too."""
    if environment.PLUGINS in env:
        theirs = env[environment.PLUGINS].split(",")
    else:
        # Endpoint plugins of others stay off, as they are without VLLM_PLUGINS.
        groups = entry_points().groups - {ENDPOINT_PLUGINS}
        theirs = sorted(
            point.name for group in groups if group.startswith("vllm.") for point in entry_points(group=group)
        )
    return list(dict.fromkeys([*OUR_PLUGINS, *filter(None, theirs)]))


def command_line(argv: list[str]) -> str:
    """The same server without our launcher, to copy and paste."""
    plugins = [f"{name}={os.environ[name]}" for name in environment.PASSED_ON if name in os.environ]
    try:
        distribution("vllm")
    except PackageNotFoundError:  # the console script needs it, repackaged builds lack it
        model = [] if argv[0].startswith("-") else ["--model", argv.pop(0)]
        return shlex.join([*plugins, "python", "-m", "vllm.entrypoints.openai.api_server", *model, *argv])
    return shlex.join([*plugins, "vllm", "serve", *argv])
