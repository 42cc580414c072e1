"""The demo model, and one engine for each module."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseserve.demo import circuits
from sparseserve.demo.build import build
from sparseserve.policies import Policy
from sparseserve.testing.engine import roomiest
from sparseserve.types import HeadShape
from tests.helpers.plugin.offline import Engine

HEADS = HeadShape(circuits.KV_HEADS, circuits.GROUP, circuits.HEAD_DIM)
PAGE = 128  # tokens, vLLM's default on the CPU


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "demo"
    build(path)
    return path


@pytest.fixture(scope="module")
def start(model: Path) -> Iterator[Callable[..., Engine]]:
    """Starts the module's engine, with room in its pages for every policy given; it ends with the module."""
    engines: list[Engine] = []

    def start(policies: Iterable[Policy], **settings: Any) -> Engine:
        engines.append(Engine(model, roomiest(policies, HEADS, PAGE), **settings))
        return engines[0]

    yield start
    for engine in engines:
        engine.llm.llm_engine.engine_core.shutdown()
