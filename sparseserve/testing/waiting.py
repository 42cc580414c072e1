"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 60.0  # seconds; other tests may leave little of the machine
PAUSE = 0.05  # seconds

Value = TypeVar("Value")


def wait_until(
    holds: Callable[[], Value],
    still: Callable[[], object] = lambda: "nothing more is known",
    *,
    timeout: float = PATIENCE,
    not_yet: tuple[type[Exception], ...] = (),
) -> Value:
    """What `holds()` is once it is true; AssertionError, with what is `still()` the case, when that takes too long.

    An exception of `not_yet` means that it does not hold; any other ends the waiting.
    """
    deadline = time.monotonic() + timeout
    while True:
        failed = None
        try:
            if value := holds():
                return value
        except not_yet as error:
            failed = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {still()}") from failed
        time.sleep(PAUSE)
