"""What our modules import, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "sparseserve"


@cache
def modules() -> dict[str, Path]:
    """Our modules, by name."""
    return {_name(path): path for path in PACKAGE.rglob("*.py")}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, typing: bool = True) -> set[str]:
    """Modules and names that a file imports, anywhere in it; those for type checkers alone only where asked for."""
    return {name for node in _nodes(ast.parse(path.read_text()), typing) for name in _names(node)}


def packages(path: Path) -> set[str]:
    """Top-level names of what a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def ours(path: Path, typing: bool = True) -> set[str]:
    """Our modules that a file imports."""
    found = (name if name in modules() else name.rpartition(".")[0] for name in imported(path, typing))
    return {name for name in found if name in modules()}


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other, if there are any."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def _nodes(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if typing or not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from _nodes(child, typing)


def _names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(str(module), names, 0):
            yield from (f"{module}.{alias.name}" for alias in names)
