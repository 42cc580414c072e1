"""Looking a name up as Python would, without anything to run: on modules, on classes, on what annotations tell."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType, NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class Missing(Exception):
    """There is no such name."""


class Unknown(Exception):
    """Nothing tells what type this has."""


def names(module: str, way: str) -> Iterator[tuple[str, bool]]:
    """The names on a way from a module, and whether they are there: the whole way is not, where one is missing.

    Ends before a name that cannot be judged.
    """
    package = module.split(".")[0]
    try:
        thing: Any = import_module(module)
        yield module, True
        for step in re.finditer(r"(\W?)(\w+)\)?", way):
            thing = LOOKUPS[step[1]](thing, step[2], package)
            yield _shown(module, way[: step.end()]), True
    except Unknown:
        return
    except Exception:  # Missing, or whatever an optional dependency does to an import where it is missing
        yield _shown(module, way), False


def _shown(module: str, way: str) -> str:
    return f"{module}.{way.replace('^', '.')}" if way else module


def _member(thing: Any, name: str, package: str) -> Any:
    """Of a module, a class or an object."""
    with suppress(AttributeError):
        return getattr(thing, name)
    with suppress(ImportError):
        if isinstance(thing, ModuleType):
            return import_module(f"{thing.__name__}.{name}")
    raise Missing


def _attribute(thing: Any, name: str, package: str) -> Any:
    """Of an instance of a class, or of what a function returns or a field is annotated with."""
    cls = _class_of(thing)
    if cls.__module__.split(".")[0] != package:
        raise Unknown
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}):
            return _annotation(base, name)
    with suppress(AttributeError):
        return getattr(cls, name)
    if any(name in _assigned(base) for base in cls.__mro__):
        return None  # there, of an unknown type
    raise Missing


def _inherited(thing: Any, name: str, package: str) -> Any:
    """Of a base, for `super()` to call."""
    found = _attribute(thing, name, package)
    if getattr(found, "__isabstractmethod__", False) and name != "__init__":  # that one often does something
        raise Missing
    return found


def _keyword(thing: Any, name: str, package: str) -> Any:
    """Of a call."""
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        raise Unknown from None
    if name not in parameters and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise Missing


LOOKUPS = {"": _member, ".": _member, ":": _attribute, "^": _inherited, "(": _keyword}


def _class_of(thing: Any) -> type:
    if isinstance(thing, property):
        thing = _annotation(thing.fget, "return")
    elif isinstance(thing, cached_property):
        thing = _annotation(thing.func, "return")
    elif inspect.isroutine(thing):
        thing = _annotation(thing, "return")
    if get_origin(thing) in (Union, UnionType):
        kinds = [kind for kind in get_args(thing) if kind is not NoneType]
        thing = kinds[0] if len(kinds) == 1 else None
    if isinstance(thing, type):
        return thing
    raise Unknown


def _annotation(owner: Any, name: str) -> Any:
    """What a class or a function annotates a name with; None where that is not imported at runtime."""
    annotation = owner.__annotations__.get(name)
    owner = inspect.unwrap(owner)
    alone = SimpleNamespace(__annotations__={name: annotation})
    with suppress(NameError, AttributeError, TypeError):
        return get_type_hints(alone, vars(sys.modules[owner.__module__]))[name]
    return None


@cache
def _assigned(cls: type) -> set[str]:
    """Attributes that the methods of a class assign."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # not written in Python
        return set()
    return {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
