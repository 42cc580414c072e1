"""The `sparseserve` command."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from sparseserve.cli import calibrate, convert, demo, doctor, explain, inspect, policies, serve, tune
from sparseserve.cli.eval import evaluate
from sparseserve.errors import SparseServeError


class Commands(TyperGroup):
    """Prints the user's errors without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SparseServeError as error:
            print(f"sparseserve: {error}", file=sys.stderr)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="sparseserve",
    help="Serve models with decode-time sparse attention in stock vLLM.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
VLLM_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
VLLM_OPTIONS = "MODEL [OPTIONS] [any option of vllm serve]"
app.command(context_settings=VLLM_ARGUMENTS, options_metavar=VLLM_OPTIONS)(serve.serve)
app.command(context_settings=VLLM_ARGUMENTS, options_metavar=VLLM_OPTIONS)(explain.explain)
app.command("eval", context_settings=VLLM_ARGUMENTS, options_metavar=VLLM_OPTIONS)(evaluate)
app.command(context_settings=VLLM_ARGUMENTS, options_metavar=VLLM_OPTIONS)(tune.tune)
app.add_typer(calibrate.app, name="calibrate")
app.command()(policies.policies)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(doctor.doctor)
app.command()(demo.demo)
