"""`sparseserve doctor`."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = {"ok": "green", "warning": "yellow", "blocks": "red"}


def doctor() -> None:
    """Check that this machine can serve, and say what to do where it cannot."""
    from sparseserve.cli.doctor.checks import diagnose  # imports torch

    findings = diagnose()
    table = Table("", "check", "found", "remedy")
    for finding in findings:
        status = Text(finding.status, style=COLOURS[finding.status])
        table.add_row(status, finding.check, Text(finding.found), Text(finding.remedy))  # no markup: sparseserve[cpu]
    Console().print(table)
    raise typer.Exit(int(any(finding.status == "blocks" for finding in findings)))
