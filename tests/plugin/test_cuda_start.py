"""What a server on CUDA does before its first request, with vLLM's classes on CPU tensors and the simulator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from sparseserve.plugin.self_check import check_worker_attention
from sparseserve.plugin.watch.requests import ServedRequests
from sparseserve.policies import Policy, Quest, Streaming, Tidal
from sparseserve.testing import target
from sparseserve.testing.target import Layout
from sparseserve.types import on_device
from tests.helpers.plugin.cuda_worker import (
    MAX_LEN,
    PAGE,
    POOL,
    Batch,
    GroupedWorker,
    Worker,
    model_shape,
    stand_in_for_flash_attention,
    vllm_config,
)
from tests.helpers.plugin.worker_metrics import value

pytestmark = pytest.mark.vllm
WINDOW: dict[str, Any] = {"sink_tokens": 4, "recent_tokens": 60, "min_tokens": 64}
POLICIES = {
    "quest": Quest(budget_tokens=128, min_tokens=64),
    "tidal": Tidal(budget_tokens=128, min_tokens=64, select_layer=0, reselect_layer=(1,)),
    "streaming": Streaming(**WINDOW, kv_memory="shared"),
    "streaming of heads": Streaming(**WINDOW),
}


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    stand_in_for_flash_attention(monkeypatch)
    with target.simulated(Layout.LBHNC):
        yield monkeypatch


def as_vllms(config: Any, attention: Any) -> Any:
    """vLLM's worker, as far as the check looks; its runner is V2's, without an `input_batch`."""
    return SimpleNamespace(vllm_config=config, model_runner=SimpleNamespace(attn_groups=attention))


def started(policy: Policy, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    config = vllm_config(folder)
    if policy.frees_pages:
        grouped = GroupedWorker(config, policy)
        return as_vllms(config, grouped.attention)
    worker = Worker(config, policy, patch=patch)
    config.device_config.device, config.cache_config.num_gpu_blocks = torch.device("cpu"), POOL
    for layer, cache in zip(worker.layers, worker.caches, strict=True):
        layer.kv_cache = cache
    group = SimpleNamespace(
        layer_names=[layer.layer_name for layer in worker.layers], metadata_builders=[worker.builder]
    )
    return as_vllms(config, [[group]])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_worker_checks_what_it_computes(policy: Policy, tmp_path: Path, simulator: pytest.MonkeyPatch) -> None:
    worker = started(policy, tmp_path, simulator)
    builder = worker.model_runner.attn_groups[0][0].metadata_builders[0]
    builder.serve(ServedRequests(policy, worker.model_runner))
    check_worker_attention(worker)


def test_a_policy_tells_what_it_attends_to_from_tensors_of_any_device() -> None:
    """That the value of a tensor without values is asked for shows that everything before it was on one device."""
    policy = POLICIES["streaming"]
    (plan, *_) = on_device(policy.plans(model_shape()), torch.device("meta"))
    with pytest.raises(RuntimeError, match="meta tensors"):
        policy.expected_tokens(plan, MAX_LEN)


def test_batches_that_nobody_asked_for_are_not_counted(tmp_path: Path, simulator: pytest.MonkeyPatch) -> None:
    policy = POLICIES["quest"]
    worker = Worker(vllm_config(tmp_path), policy, patch=simulator)
    runner: Any = SimpleNamespace(req_states=SimpleNamespace(index_to_req_id={}))  # all that is read of V2's
    worker.builder.serve(ServedRequests(policy, runner))
    prefill = partial(value, "sparseserve_dense_rows_total", policy="quest", reason="prefill")
    before = prefill()
    worker.builder.build(0, Batch([PAGE, 5], [PAGE, 5], [True, True]).metadata(torch.zeros(2, 7).int(), "cpu"))
    assert prefill() == before


def test_the_worker_leaves_torch_as_it_is() -> None:
    """vLLM's CPU worker replaces torch.cuda's streams and events for the whole process when it is imported."""
    program = (
        "import sys, sparseserve.plugin as plugin, sparseserve.plugin.worker_cuda, sparseserve.plugin.backends.cuda\n"
        "plugin.register()\n"
        "assert not [name for name in sys.modules if name.startswith('vllm.v1.worker.cpu')]"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
