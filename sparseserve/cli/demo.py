"""`sparseserve demo`."""

from __future__ import annotations

import typer

from sparseserve.cli.extras import VLLM, need


def demo() -> None:
    """Build a small model, serve it under four policies, ask the same questions and compare."""
    need("evaluate", "openai")
    need(VLLM, "vllm")
    from sparseserve.demo.run import run

    raise typer.Exit(run())
