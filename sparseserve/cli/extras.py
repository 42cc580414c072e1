"""Packages that only some commands need."""

from __future__ import annotations

from importlib.util import find_spec

from sparseserve.errors import Problem, UnsupportedError


def need(extra: str, *packages: str) -> None:
    """Raise UnsupportedError with the extra to install if one of the packages is missing."""
    for package in packages:
        if find_spec(package) is None:
            remedy = f'pip install "sparseserve[{extra}]"'
            raise UnsupportedError(
                Problem("package", f"{package}, not installed", "what this command needs", remedy=remedy)
            )
