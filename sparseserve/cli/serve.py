"""`sparseserve serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparseserve.cli.extras import VLLM, need
from sparseserve.server.launch.supervise import supervise


def serve(
    ctx: typer.Context,
    policy: Annotated[str, typer.Option(metavar="NAME|FILE", help="A policy, or a file with one for each model.")] = "",
    pairs: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter; repeatable.")
    ] = None,
    max_request_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest body of a request, in bytes; 32 MiB without.", show_default=False)
    ] = None,
    page: Annotated[bool, typer.Option("--page", help="Serve the live page at /sparsity; off by default.")] = False,
) -> None:
    """Serve MODEL with vLLM's own server, decoding under a policy.

    Every other option goes to `vllm serve` untouched; `sparseserve serve -- --help=all` lists them.

    Without --policy, SPARSESERVE_POLICY is read; without --set budget_tokens=N, SPARSESERVE_SET_BUDGET_TOKENS.
    """
    need(VLLM, "vllm")
    ours = ["--policy", policy] if policy else []
    for pair in pairs or []:
        ours += ["--set", pair]
    ours += ["--max-request-bytes", str(max_request_bytes)] if max_request_bytes else []
    ours += ["--page"] if page else []
    # A child process of its own: this one stays small and tells a stop from a death.
    raise typer.Exit(supervise([sys.executable, "-m", "sparseserve.server", *ours, "--", *ctx.args]))
