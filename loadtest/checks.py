"""What was expected and what was found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation."""

    of: str
    expected: str
    found: str
    ok: bool


def show(title: str, checks: Sequence[Check]) -> bool:
    """Print the table; whether all is as expected."""
    table = Table("", "expected", "found", "", title=title, show_lines=True)
    for one in checks:
        table.add_row(one.of, one.expected, one.found, "ok" if one.ok else "[red]DIFFERS")
    Console().print(table)
    return all(one.ok for one in checks)
