"""The memory of a CUDA step: where vLLM's profiling sees it, and told when it is too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.worker.workspace import (
    WorkspaceManager,
    current_workspace_manager,
    init_workspace_manager,
    reset_workspace_manager,
)

from sparseserve.decode.step import StepWorkspace
from sparseserve.errors import UnsupportedError
from sparseserve.plugin.backends.cuda import SparseCUDABuilder
from sparseserve.policies import Dense, Policy, Tidal
from sparseserve.types import CPU
from tests.helpers.plugin.cuda_worker import (
    LAYERS,
    MAX_LEN,
    Batch,
    Worker,
    only_resource,
    stand_in_for_flash_attention,
    step_of,
    vllm_config,
)

pytestmark = pytest.mark.vllm
Start = Callable[[Policy], Worker]
TIDAL = Tidal(select_layer=1, reselect_layer=(1,))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    stand_in_for_flash_attention(monkeypatch)
    config = vllm_config(tmp_path)
    return lambda policy: Worker(config, policy, patch=monkeypatch)


@pytest.fixture
def workspace() -> Iterator[WorkspaceManager]:
    """What a worker starts with."""
    init_workspace_manager(torch.device("cpu"))
    yield current_workspace_manager()
    reset_workspace_manager()


def test_the_profiling_run_allocates_what_the_builder_takes(start: Start, workspace: WorkspaceManager) -> None:
    worker = start(TIDAL)  # its builder has taken memory of the workspace before
    init_workspace_manager(torch.device("cpu"))  # as if only the layers were there
    query = torch.ones(3, 4, 64, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        assert not worker.forward(layer, None, query, query[:, :2], query[:, :2]).any()
    current_workspace_manager().lock()
    builder = SparseCUDABuilder(worker.spec, [layer.layer_name for layer in worker.layers], worker.config, CPU)
    memory = only_resource()
    batch = Batch([448] * 8, [1] * 8).metadata(torch.zeros(8, 7, dtype=torch.int32), "cpu")
    step = step_of(builder.build_for_cudagraph_capture(batch))
    assert step is not None
    assert step.scores.data_ptr() == memory.scores.data_ptr() and memory.nbytes == 8 * 2 * MAX_LEN * 4


def test_too_little_memory_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start(TIDAL)
    allocate = StepWorkspace.allocate

    def full(*arguments: Any) -> StepWorkspace:
        if arguments[-1].type == "meta":
            return allocate(*arguments)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(StepWorkspace, "allocate", full)
    told = r"--max-num-seqs = 8 .*up to 448 tokens take 0\.00 GiB under tidal.*--max-model-len, or --set unit_tokens=32"
    with pytest.raises(UnsupportedError, match=told):
        worker.builder.bind(TIDAL)
    with pytest.raises(UnsupportedError, match=r"a smaller --max-num-seqs or --max-model-len\.$"):
        worker.builder.bind(Dense())
