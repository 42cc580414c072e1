"""`sparseserve serve`: check everything, then run vLLM's own server with the policy."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from itertools import chain
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from sparseserve import environment, ops
from sparseserve.config import ADDITIONAL_CONFIG, WORKERS, PolicySource, find_policy, to_dict
from sparseserve.errors import ConfigError, Problem, SparseServeError, UnsupportedError
from sparseserve.footprint.stores import emptiest_rank, needed_bytes, predict_memory
from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.request_options import aliases, own_names
from sparseserve.server.launch.supervise import SERVER_ENDED
from sparseserve.types import LayerPlan, Role

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OUR_PLUGINS = ["sparseserve", "sparseserve_front", "sparseserve_metrics", "sparseserve_routes"]
ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
DRAIN_TIMEOUT = 30  # seconds; vLLM's own 0 cuts running answers
CUDA_PAGE = 64  # tokens, at least; vLLM's 16 hold no unit of most policies


def main(argv: list[str]) -> int:
    """Serve: `argv` is [--policy P] [--set K=V]... -- and the arguments of `vllm serve`."""
    own = argparse.ArgumentParser("sparseserve serve")
    own.add_argument("--policy")
    own.add_argument("--set", action="append", default=[])
    own.add_argument("--max-request-bytes")
    own.add_argument("--page", action="store_true")
    split = argv.index("--")
    ours = own.parse_args(argv[:split])
    if ours.page:
        os.environ[environment.PAGE] = "1"  # read by the API server
    if ours.max_request_bytes:
        os.environ[environment.REQUEST_BYTES] = ours.max_request_bytes  # read by the API server, too
    try:
        serve(find_policy(ours.policy, ours.set, os.environ), argv[split + 1 :])
    except SparseServeError as error:
        print(f"sparseserve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return SERVER_ENDED


def serve(source: PolicySource, argv: list[str]) -> None:
    """Check the policy against vLLM's arguments, then run the server until it ends."""
    ops.isa()  # raises KernelsNotBuiltError
    os.environ[environment.PLUGINS] = ",".join(allowed_plugins(os.environ))  # read when vLLM loads its plugins
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does
    from vllm.entrypoints.cli.serve import ServeSubcommand

    launch = prepare(source, argv)
    print(f"{launch.command}\n{launch.description}", file=sys.stderr, flush=True)
    ServeSubcommand.cmd(launch.args)


@dataclass(frozen=True, slots=True)
class Launch:
    """A server that passed every check."""

    args: argparse.Namespace
    command: str
    description: str


def prepare(source: PolicySource, argv: list[str]) -> Launch:
    """Everything that can be known before the engine starts."""
    from sparseserve.server.launch.checks import check_supported, model_shape, plan_layers

    environment.max_request_bytes()  # raises ConfigError
    with vllm_errors():
        args = parse(argv)
    check_metrics_folder(args, os.environ)
    check_api_servers(args)
    policy = source.policy(args.model)
    argv = [*argv, *policy_flags(policy, args), *server_flags(policy, args), *platform_flags(policy, args)]
    with vllm_errors():
        args = parse(argv)
        config = engine_config(args)
    check_supported(config, policy)
    shape = model_shape(config)
    try:
        plans = plan_layers(config, policy, shape)
    except ConfigError as error:
        raise source.locate(error, args.model) from None
    return Launch(args, command_line(argv), describe(config, policy, plans, shape))


def check_api_servers(args: argparse.Namespace) -> None:
    """Raise UnsupportedError for a server without our front, and for one API server before several engines."""
    if args.grpc:
        allowed = "off: the gRPC server knows no keys, no limits, no options of requests and no metrics of ours"
        raise UnsupportedError(Problem("--grpc", True, allowed, remedy="drop --grpc"))
    if args.data_parallel_size > 1 and args.api_server_count == 1:
        allowed = f"2 or more with --data-parallel-size {args.data_parallel_size}: one shows the first engine's metrics"
        remedy = "drop it: vLLM starts an API server for every engine"
        raise UnsupportedError(Problem("--api-server-count", 1, allowed, remedy=remedy))


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


def engine_config(args: argparse.Namespace) -> VllmConfig:
    """The configuration that vLLM derives; reads the model's config.json, not its weights."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    config: VllmConfig = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    return config


@contextmanager
def vllm_errors() -> Iterator[None]:
    """vLLM's own message without the traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise SparseServeError(f"vLLM refuses this configuration: {error}") from error


def policy_flags(policy: Policy, args: argparse.Namespace) -> list[str]:
    """What to add to `vllm serve`; the user's own additional_config stays."""
    from vllm.platforms import current_platform

    settings = dict(args.additional_config)
    if ADDITIONAL_CONFIG in settings:
        remedy = "give --policy and --set in its place"
        raise ConfigError(
            f"--additional-config {ADDITIONAL_CONFIG}",
            settings[ADDITIONAL_CONFIG],
            "none: the policy sets it",
            remedy=remedy,
        )
    worker = WORKERS["cuda" if current_platform.is_cuda() else "cpu"]
    if args.worker_cls not in ("auto", worker):
        allowed = f"none: a policy needs {worker}"
        remedy = "drop the flag; --worker-extension-cls adds methods to it"
        raise UnsupportedError(Problem("--worker-cls", args.worker_cls, allowed, remedy=remedy))
    settings[ADDITIONAL_CONFIG] = to_dict(policy)
    # One dotted flag per key, all of them: vLLM lets dotted flags win over a JSON one.
    pairs = [[f"--additional-config.{key}", json.dumps(value)] for key, value in settings.items()]
    return [*chain.from_iterable(pairs), "--worker-cls", worker]


def server_flags(policy: Policy, args: argparse.Namespace) -> list[str]:
    """What to add for the API server: time to drain, and aliases of the served models after the user's own names."""
    names = own_names(args.served_model_name or [args.model], policy)
    listed = dict.fromkeys([*names, *chain.from_iterable(aliases(name, policy) for name in names)])
    return ["--shutdown-timeout", str(args.shutdown_timeout), "--served-model-name", *listed]


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


def platform_flags(policy: Policy, args: argparse.Namespace) -> list[str]:
    """What to add on CUDA: our backend for full attention, and pages of whole units unless the user gave a size."""
    from vllm.platforms import current_platform

    return cuda_flags(policy, args) if current_platform.is_cuda() else []


def cuda_flags(policy: Policy, args: argparse.Namespace) -> list[str]:
    """`platform_flags` on CUDA."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    given = args.attention_config
    kinds = given.backend_per_kind
    for backend in (args.attention_backend, given.backend, kinds.get("full_attention")):
        name = getattr(backend, "name", backend)
        if name not in (None, "CUSTOM"):
            allowed = "none: a policy comes with a backend of its own"
            raise UnsupportedError(Problem("attention backend", name, allowed, remedy="drop the flag that chooses it"))
    settings = {field.name: getattr(given, field.name) for field in fields(given)}
    changed = {key: value for key, value in settings.items() if value != getattr(type(given)(), key)}
    changed["backend_per_kind"] = {**kinds, "full_attention": AttentionBackendEnum.CUSTOM}
    # One dotted flag per key, as above; backends go by their names.
    pairs = [
        [f"--attention-config.{key}", json.dumps(value, default=lambda backend: backend.name)]
        for key, value in changed.items()
    ]
    if not args.block_size:
        pairs.append(["--block-size", str(-(-CUDA_PAGE // policy.selection_unit) * policy.selection_unit)])
    return [*chain.from_iterable(pairs)]


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


def describe(config: VllmConfig, policy: Policy, plans: Sequence[LayerPlan], model: ModelShape) -> str:
    """What the policy will do, in one line."""
    from sparseserve.server.launch.checks import model_dtype

    length = config.model_config.max_model_len
    roles = {role: [plan.layer for plan in plans if plan.role is role] for role in Role}
    attended = sum(policy.expected_tokens(plan, length) for plan in plans)
    backend = f"CPU_ATTN ({ops.isa()})" if config.device_config.device_type == "cpu" else "CUSTOM (cuda)"
    parts = [
        " ".join(f"{key}={value}" for key, value in to_dict(policy).items()),
        "layers " + ", ".join(f"{role.value} {ranges(layers)}" for role, layers in roles.items() if layers),
        f"backend {backend}",
        f"runner {'V2' if config.use_v2_model_runner else 'V1'}",
        f"attends to {attended / (length * len(plans)):.1%} of the KV cache per step at {length} tokens",
        _stored(policy, model, model_dtype(config).itemsize),
    ]
    return "sparseserve: " + "; ".join(parts)


def _stored(policy: Policy, model: ModelShape, element_bytes: int) -> str:
    """What the longest row stores, on the rank with most empty slots."""
    rank = emptiest_rank(policy, model, element_bytes)
    plans = policy.plans(rank)
    row = predict_memory(policy, plans, rank, element_bytes).row(rank.max_len)
    cost = row.over(needed_bytes(policy, plans, rank, element_bytes, rank.max_len))
    waste = f"; rounded windows and empty slots cost {cost:.1%}" if policy.frees_pages else ""
    return f"stores {1 / row.ratio:.1%} of dense attention's ({row.ratio:.2f}x less){waste}"


def ranges(layers: Iterable[int]) -> str:
    """Layers as `0-1 4 6-9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
