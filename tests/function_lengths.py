"""How long functions are: `python -m tests.function_lengths`."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from tests.helpers.paths import ROOT

FOLDERS = ("sparseserve", "loadtest", "kernels/bench")


@dataclass(frozen=True, order=True, slots=True)
class Function:
    """A function, its signature and body in lines."""

    lines: int
    name: str
    where: str  # file:line


def functions(root: Path = ROOT, folders: Sequence[str] = FOLDERS) -> list[Function]:
    """All functions, the longest first."""
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found = [
        Function(
            (node.end_lineno or node.lineno) - node.lineno + 1, node.name, f"{path.relative_to(root)}:{node.lineno}"
        )
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(found, reverse=True)


def ninth_decile(lines: Sequence[int]) -> float:
    """What nine of ten are not longer than."""
    return quantiles(lines, n=10)[-1]


def main() -> None:
    """Print how many there are, how long they are, and the ten longest."""
    found = functions()
    lines = [function.lines for function in found]
    print(f"{len(found)} functions, median {median(lines):g} lines, p90 {ninth_decile(lines):g}, the longest:")
    for function in found[:10]:
        print(f"{function.lines:5} {function.where} {function.name}")


if __name__ == "__main__":
    main()
