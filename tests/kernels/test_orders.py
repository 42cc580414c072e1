"""The CUDA kernels give the same bits whatever order the threads of a block run in: a race would not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.artifacts import save
from sparseserve.model import ModelShape
from sparseserve.policies import Hip, Policy, Quest, Seer, Tidal
from sparseserve.testing import target
from sparseserve.testing.bed import Bed, Outcome
from sparseserve.testing.gates import plain_rope, random_gates
from sparseserve.testing.target import Layout
from sparseserve.types import HeadShape

MODEL = ModelShape(
    name="orders",
    layers=3,
    heads=HeadShape(kv_heads=2, queries_per_kv=4, head_dim=64),
    max_len=700,
    page_size=64,
    rope=lambda dim: plain_rope(700, dim),
)
LENGTHS = [0, 65, 700]
POLICIES = ["hip", "quest", "seer", "tidal"]  # between them they run every op


@pytest.fixture
def policies(tmp_path: Path) -> dict[str, Policy]:
    gates = tmp_path / "gates.safetensors"
    save(random_gates(MODEL, block_size=16, gate_dim=64), gates)
    hip: dict[str, Any] = {"wide_layers": 0, "chunk_tokens": (32, 16, 8), "stage_tokens": (256, 128), "sink_tokens": 8}
    return {
        "hip": Hip(budget_tokens=128, recent_tokens=16, **hip),
        "quest": Quest(budget_tokens=128, dense_layers=1),
        "seer": Seer(budget_tokens=128, artifact=str(gates)),
        "tidal": Tidal(budget_tokens=128, select_layer=1, reselect_layer=(2,)),
    }


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with target.simulated(Layout.LBHNC):
        yield
        target.use_order("forward")


def run(policy: Policy, order: str) -> tuple[Outcome, list[torch.Tensor]]:
    target.use_order(order)
    random = torch.Generator().manual_seed(0)
    heads, rows = MODEL.heads, len(LENGTHS)
    query = torch.randn(MODEL.layers, rows, heads.query_heads, heads.head_dim, generator=random).bfloat16()
    shape = (2, MODEL.layers, rows, MODEL.max_len, heads.kv_heads, heads.head_dim)
    key, value = torch.randn(shape, generator=random).bfloat16()
    bed = Bed(policy, MODEL, LENGTHS).fill(key, value)
    return bed.decode(query * 2), [layer.page_state for layer in bed.layers if layer.page_state is not None]


@pytest.mark.parametrize("name", POLICIES)
def test_every_order_gives_the_same_bits(name: str, policies: dict[str, Policy]) -> None:
    outcome, summaries = run(policies[name], "forward")
    assert outcome.out.isfinite().all()
    for order in ("backward", "random"):
        other, other_summaries = run(policies[name], order)
        assert torch.equal(other.out, outcome.out) and all(map(torch.equal, other.masks, outcome.masks))
        assert all(map(torch.equal, other_summaries, summaries))
