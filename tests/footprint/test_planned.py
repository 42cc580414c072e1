"""A model that is planned once: what its ranks read and store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseserve.footprint.planned import plan_model
from sparseserve.footprint.reads import step_cost
from sparseserve.footprint.stores import needed_bytes
from sparseserve.model import ModelShape
from sparseserve.policies import Moa, Quest
from sparseserve.types import HeadShape

PAGE, LONGEST, SLOT = 64, 8192, 64 * 2 * 64 * 2
MODEL = ModelShape(
    "m", layers=6, heads=HeadShape(kv_heads=1, queries_per_kv=2, head_dim=64), max_len=LONGEST, page_size=PAGE, ranks=2
)


@pytest.fixture
def moa(tmp_path: Path) -> Moa:
    """All windows on the second rank."""
    lines = {"alphas": [[0, 0, 256, 256]] * 6, "betas": [[1, 1, 0, 0]] * 6}
    (plan := tmp_path / "plan.json").write_text(json.dumps(lines))
    return Moa(artifact=str(plan))


def test_rows_are_told_of_the_rank_that_needs_least(moa: Moa) -> None:
    planned = plan_model(moa, MODEL, 2)
    memory, (row,) = planned.stored([LONGEST])
    assert [group.heads for group in memory.groups] == [0, 6]
    assert row.needed == needed_bytes(moa, planned.plans[1], planned.shapes[1], 2, LONGEST) == 6 * 4 * SLOT
    assert row.stored == planned.memory(1).row(LONGEST)
    assert row.rounding == pytest.approx(row.stored.bytes / row.needed - 1) and row.rounding > 10
    assert [group.heads for group in planned.memory(0).groups] == [6, 0]


def test_a_rank_gives_the_same_plans_whichever_it_was_made_for(moa: Moa) -> None:
    first, second = (plan_model(moa, shape, 2) for shape in plan_model(moa, MODEL, 2).shapes)
    assert first.model == second.model == MODEL
    assert first.step(LONGEST, 1) == second.step(LONGEST, 1) != first.step(LONGEST)


def test_shared_memory_costs_no_rounding() -> None:
    planned = plan_model(Quest(), MODEL, 2)
    memory, rows = planned.stored([100, LONGEST])
    assert [(row.length, row.rounding) for row in rows] == [(100, 0), (LONGEST, 0)]
    assert memory == planned.memory(0) == planned.memory(1)
    assert planned.step(LONGEST) == step_cost(planned.policy, planned.plans[0], MODEL, LONGEST, 2)
