"""The names of vLLM that our source relies on: what it imports, looks up, overrides and passes by keyword."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparseserve.cli.doctor.uses import OurClass, Thing, Uses

PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Seam:
    """A name of vLLM, and where our source needs it."""

    module: str
    way: str  # from the module, as a `Thing` has it
    where: str  # file:line


def seams(package: Path = PACKAGE) -> list[Seam]:
    """The seams of a package's modules, in the order of files and lines."""
    files = {path.relative_to(package.parent): _uses(path, package) for path in sorted(package.rglob("*.py"))}
    classes = {name: cls for uses in files.values() for name, cls in uses.classes.items()}
    inherited = {name for uses in files.values() for name in uses.inherited}
    ours = {name for uses in files.values() for name in uses.mentioned} - inherited
    found: dict[Seam, None] = {}
    for path, uses in files.items():
        used = [(theirs, line) for thing, line in uses.used for theirs in _theirs(thing, classes)]
        for thing, line in sorted([*used, *_overridden(uses, classes, ours)], key=lambda use: use[1]):
            found[Seam(thing.module, thing.way.rstrip(".:^"), f"{path}:{line}")] = None
    return [*found]


def _uses(path: Path, package: Path) -> Uses:
    parts = path.relative_to(package.parent).with_suffix("").parts
    uses = Uses(".".join(parts).removesuffix(".__init__"))
    uses.visit(ast.parse(path.read_text()))
    return uses


def _overridden(uses: Uses, classes: Mapping[Thing, OurClass], ours: Container[str]) -> Iterator[tuple[Thing, int]]:
    """What a class defines and no code of ours asks for, other than by `super()`, is for vLLM to ask for."""
    for name in uses.classes:
        for member, line in classes[name].names.items():
            if line and member not in ours and not member.startswith("__"):
                yield from ((base.member(member), line) for _, base in _lineages(name, classes) if base)


def _theirs(thing: Thing, classes: Mapping[Thing, OurClass]) -> Iterator[Thing]:
    """The same as vLLM's: what our classes do not define is a name of the class of vLLM among their bases."""
    if _is_theirs(thing):
        yield thing
    step = re.match(r"(\w+)(\W)(\w+)(.*)", thing.way)
    cls = Thing(thing.module).member(step[1]) if step else thing
    if step is None or cls not in classes:
        return
    _, how, name, rest = step.groups()
    for ours, base in _lineages(cls, classes):
        kinds = [one.types.get(name) for one in ours if name in one.names and how != "^"]
        if base and not kinds:
            yield Thing(base.module, f"{base.way[:-1]}{how}{name}{rest}")
        elif kinds and kinds[0] and _is_theirs(kinds[0]) and rest.strip(".:"):
            yield Thing(kinds[0].module, kinds[0].way[:-1] + rest)


def _is_theirs(thing: Thing) -> bool:
    return thing.module.split(".")[0] == "vllm"


def _lineages(cls: Thing, classes: Mapping[Thing, OurClass]) -> Iterator[tuple[list[OurClass], Thing | None]]:
    """A class with its ancestors of ours, and vLLM's nearest; of one that is mixed into others, those of the others."""
    others = (_lineage(other, classes) for other in classes if other != cls)
    for lineage in [other for other in others if cls in other] or [_lineage(cls, classes)]:
        yield [classes[one] for one in lineage if one in classes], next(filter(_is_theirs, lineage), None)


def _lineage(cls: Thing, classes: Mapping[Thing, OurClass]) -> list[Thing]:
    lineage = [cls]
    for one in lineage:  # grows
        lineage += classes[one].bases if one in classes else []
    return lineage
