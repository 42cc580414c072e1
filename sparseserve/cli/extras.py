"""Packages that only some commands need."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from sparseserve.errors import Problem, UnsupportedError

VLLM = ("cpu", "cuda")  # extras that bring it


def need(extra: str | Sequence[str], *packages: str) -> None:
    """Raise UnsupportedError with the extra, or one of those, to install if one of the packages is missing."""
    for package in packages:
        if find_spec(package) is None:
            extras = [extra] if isinstance(extra, str) else extra
            remedy = " or ".join(f'pip install "sparseserve[{one}]"' for one in extras)
            raise UnsupportedError(
                Problem("package", f"{package}, not installed", "what this command needs", remedy=remedy)
            )
