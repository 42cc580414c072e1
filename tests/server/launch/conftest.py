"""What checking a server needs of its surroundings."""

from __future__ import annotations

import pytest

from sparseserve import ops


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "sparseserve")
    monkeypatch.setattr(ops, "isa", lambda: "portable")  # whether kernels are built has a test of its own
