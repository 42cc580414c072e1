"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60  # seconds; other tests may leave little of the machine


def wait_until(holds: Callable[[], bool]) -> None:
    """Return once `holds()`; AssertionError when it does not within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.02)
