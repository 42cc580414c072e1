"""Two servers for all: dense, and quest that measures what it keeps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseserve.demo.build import build
from sparseserve.evaluation.run import FORCING
from sparseserve.server.process import SERVE, Server, running

FLAGS = ["--max-model-len", "2560", "--max-num-seqs", "4", "--enforce-eager"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "demo"
    build(path)
    return path


def _serve(model: Path, *flags: str) -> Iterator[Server]:
    command, env = [*SERVE, str(model), *flags, *FLAGS, *FORCING], {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with running(command, model.parent / f"{flags[1]}.log", env) as server:
        yield server


@pytest.fixture(scope="session")
def dense(model: Path) -> Iterator[Server]:
    yield from _serve(model, "--policy", "dense")


@pytest.fixture(scope="session")
def quest(model: Path) -> Iterator[Server]:
    yield from _serve(model, "--policy", "quest", "--set", "budget_tokens=768", "--set", "measure_recall=true")
