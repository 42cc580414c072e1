"""Four servers, started when first needed and shared: plugin absent, dense, quest, and tidal behind two API servers."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseserve.demo.build import build
from sparseserve.demo.circuits import RESELECT_LAYER
from sparseserve.server.launch.process import SERVE, Server, running

FLAGS = ["--served-model-name", "demo", "--max-model-len", "9216", "--max-num-seqs", "16", "--enforce-eager"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo"
    build(path)
    return path


@pytest.fixture(scope="session")
def absent(model: Path) -> Iterator[Server]:
    """vLLM alone: an empty VLLM_PLUGINS allows no plugin."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *FLAGS]
    with running(command, model.parent / "absent.log", ENV | {"VLLM_PLUGINS": ""}) as server:
        yield server


def _serve(model: Path, *flags: str) -> Iterator[Server]:
    with running([*SERVE, str(model), *flags, *FLAGS], model.parent / f"{flags[1]}.log", ENV) as server:
        yield server


@pytest.fixture(scope="session")
def dense(model: Path) -> Iterator[Server]:
    yield from _serve(model, "--policy", "dense")


@pytest.fixture(scope="session")
def quest(model: Path) -> Iterator[Server]:
    yield from _serve(model, "--policy", "quest")


@pytest.fixture(scope="session")
def tidal(model: Path) -> Iterator[Server]:
    flags = ("--policy", "tidal", "--set", f"reselect_layer={RESELECT_LAYER}", "--api-server-count", "2")
    yield from _serve(model, *flags)
