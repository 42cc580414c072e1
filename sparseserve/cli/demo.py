"""`sparseserve demo`."""

from __future__ import annotations

import typer


def demo() -> None:
    """Build a small model, serve it under four policies, ask the same questions and compare."""
    from sparseserve.demo.run import run

    raise typer.Exit(run())
