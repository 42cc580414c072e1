"""`sparseserve serve`: check everything, then run vLLM's own server with the policy."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass

from sparseserve import environment, ops
from sparseserve.config import PolicySource, find_policy
from sparseserve.errors import SparseServeError
from sparseserve.server.launch.description import describe
from sparseserve.server.launch.flags import allowed_plugins, check_metrics_folder, command_line, parse
from sparseserve.server.launch.supervise import SERVER_ENDED


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
    from sparseserve.server.launch.checks import check  # imports vllm

    environment.max_request_bytes()  # raises ConfigError
    args = parse(argv)
    check_metrics_folder(args, os.environ)
    checked = check(source, argv, args)
    return Launch(checked.args, command_line(checked.argv), describe(checked.config, checked.planned))
