"""At batch 1 launches dominate: a layer is one kernel, or two when it selects, and nothing of torch beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparseserve.decode.layer import decode_layer
from sparseserve.policies import Policy, Quest
from sparseserve.testing import target
from sparseserve.testing.bed import Bed
from sparseserve.testing.target import Layout
from sparseserve.types import LayerPlan, PageTable, Role
from tests.helpers.contract import CASES, MODEL

LENGTHS = [300, 448, 20]
POLICIES = [name for name in CASES if name != "retrieval-compensate"]  # which waits for the host


class Ops(TorchDispatchMode):
    """Counts what torch runs, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with target.simulated(Layout.LBHNC):
        yield


def launched(policy: Policy, **measured: Any) -> Iterator[tuple[LayerPlan, int, int]]:
    """The plan of every layer, the kernels that it launches, and what torch runs, the memory for outputs left out."""
    heads, bed = MODEL.heads, Bed(policy, MODEL, LENGTHS)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    step = bed.buffers.step(PageTable(bed.pages, lengths), whole=lengths <= 20, **measured)
    policy.prepare(step, MODEL)
    query = torch.zeros(len(LENGTHS), heads.query_heads, heads.head_dim, dtype=torch.bfloat16)
    for layer in bed.layers:
        before = target.launches()
        with Ops() as ran:
            decode_layer(layer, step, query, torch.empty_like(query))
        yield layer.plan, target.launches() - before, ran.count - 1


@pytest.mark.parametrize("name", POLICIES)
def test_launches_of_a_layer(name: str) -> None:
    for plan, kernels, ran in launched(CASES[name]):
        assert kernels == ran == (2 if plan.role is Role.SELECT else 1)


@pytest.mark.parametrize("measured", [(), (1, 2)], ids=["nothing", "some"])
def test_a_graph_that_may_measure_launches_two_kernels_more_whatever_is_measured(measured: tuple[int, ...]) -> None:
    policy = Quest(dense_layers=1, budget_tokens=128, recall_sample=0.01)
    layers = range(1, MODEL.layers)
    for plan, kernels, _ in launched(policy, measured=measured, launched=layers):
        assert kernels == (4 if plan.layer in layers else 1)
