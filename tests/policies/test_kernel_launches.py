"""At batch 1 launches dominate: a layer is one kernel, or two when it selects, and nothing of torch beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_contract import CASES, MODEL
from torch.utils._python_dispatch import TorchDispatchMode

from sparseserve.decode import decode_layer
from sparseserve.testing import target
from sparseserve.testing.bed import Bed
from sparseserve.testing.target import Layout
from sparseserve.types import PageTable, Role

LENGTHS = [300, 448, 20]
POLICIES = [name for name in CASES if name != "retrieval-compensate"]  # which waits for the host


class Ops(TorchDispatchMode):
    """Counts what torch runs, views left out."""

    def __init__(self) -> None:
        super().__init__()
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


@pytest.mark.parametrize("name", POLICIES)
def test_launches_of_a_layer(name: str) -> None:
    policy, heads = CASES[name], MODEL.heads
    bed = Bed(policy, MODEL, LENGTHS)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    step = bed.buffers.step(PageTable(bed.pages, lengths), whole=lengths <= 20)
    policy.prepare(step, MODEL)
    query = torch.zeros(len(LENGTHS), heads.query_heads, heads.head_dim, dtype=torch.bfloat16)
    for layer in bed.layers:
        before = target.launches()
        with Ops() as ran:
            decode_layer(layer, step, query, torch.empty_like(query))
        expected = 2 if layer.plan.role is Role.SELECT else 1
        assert target.launches() - before == expected
        assert ran.count - 1 == expected  # and the memory for the output
