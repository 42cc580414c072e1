"""Ops that score and select at once: the same scores, and the selection that select_units makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparseserve import ops, reference
from sparseserve.testing.cases import Case, paged_kv
from sparseserve.testing.gates import plain_rope
from sparseserve.types import Bound, Gate, HeadShape, Selection, Wanted

pytestmark = pytest.mark.usefixtures("device")
SHAPE = HeadShape(kv_heads=2, queries_per_kv=3, head_dim=64)
LENGTHS, PAGE = [0, 1, 130, 1500, 333, 1408], 128  # 1408 tokens end a page, a unit and a block of the kernels


@dataclass(frozen=True)
class Scored:
    """An op that scores, with all of its arguments but the last ones."""

    op: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    arguments: tuple[object, ...]
    heads: int
    unit: int

    def scores(self, wanted: Wanted | None = None, plain: bool = False) -> Tensor:
        room = torch.full((len(LENGTHS), self.heads, 1536 // self.unit), -7.0)
        return (self.plain if plain else self.op)(*self.arguments, scores=room, wanted=wanted)


def pages(case: Case, unit: int) -> Scored:
    summary = torch.zeros(len(case.kv.key), 2, PAGE // unit, 2, SHAPE.head_dim, dtype=case.query.dtype)
    for row in range(len(LENGTHS)):
        ops.summarize_pages(case.kv.key, case.slots(row)[0], summary, Bound.MEAN_STD)
    arguments = case.query, summary, case.table, unit, Bound.MEAN_STD
    return Scored(ops.score_pages, reference.score_pages, arguments, 2, unit)


def gates(case: Case, unit: int) -> Scored:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, SHAPE.queries_per_kv, SHAPE.head_dim, 32, generator=random)
    gate = Gate(query, query, None, None, unrope=plain_rope(1536, SHAPE.head_dim), rope=None)
    summary = torch.randn(len(case.kv.key), 2, PAGE // unit, 32, generator=random)
    arguments = case.query, summary, case.table, unit, gate
    return Scored(ops.score_gates, reference.score_gates, arguments, 2, unit)


def tokens(heads: int) -> Callable[[Case, int], Scored]:
    def scored(case: Case, unit: int) -> Scored:
        lse = torch.full((len(LENGTHS), SHAPE.query_heads), 8.0)

        def op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *arguments, **options: function(*arguments, unit_tokens=unit, **options)

        arguments = case.query, case.kv.key, case.table, lse, case.scale
        return Scored(op(ops.score_tokens), op(reference.score_tokens), arguments, heads, unit)

    return scored


KINDS = {
    "pages": (pages, 16),
    "gates": (gates, 32),
    "tokens": (tokens(2), 1),
    "tokens-all_heads": (tokens(1), 16),
    "tokens-query_head": (tokens(6), 32),
}


@pytest.fixture(params=KINDS)
def scored(request: pytest.FixtureRequest) -> Scored:
    make, unit = KINDS[request.param]
    return make(paged_kv(LENGTHS, SHAPE, PAGE, torch.bfloat16, poison=0.0), unit)


def wanted(scored: Scored, threshold: float | None = None, row_budget: Tensor | None = None) -> Wanted:
    """Every head has its own sink, window and budget."""
    slots = 1536 // scored.unit
    selection = Selection.empty(len(LENGTHS), scored.heads, slots, scored.unit)
    sink, recent = (torch.arange(scored.heads, dtype=torch.int32) * tokens for tokens in (5, 40))
    return Wanted(selection, sink, recent, sink + recent + 200, threshold, row_budget)


def assert_same(one: Selection, other: Selection) -> None:
    for name in ("spans", "units", "count"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("threshold", [None, -2.0])
@pytest.mark.parametrize("row_budget", [None, [0, 500, 20, 700, 333, 90]], ids=["", "row_budget"])
def test_scoring_and_selecting_at_once_is_scoring_then_selecting(
    scored: Scored, threshold: float | None, row_budget: list[int] | None
) -> None:
    own = None if row_budget is None else torch.tensor(row_budget, dtype=torch.int32)
    expected, at_once, again = (wanted(scored, threshold, own) for _ in range(3))
    scores = scored.scores()
    ops.select_units(scores, torch.tensor(LENGTHS, dtype=torch.int32), expected)
    assert torch.equal(scored.scores(at_once), scores)
    scored.scores(again)
    assert_same(at_once.selection, expected.selection)
    assert_same(again.selection, expected.selection)
    assert expected.selection.count.any()


def test_the_reference_selects_too(scored: Scored) -> None:
    expected, at_once = wanted(scored), wanted(scored)
    scores = scored.scores(plain=True)
    reference.select_units(scores, torch.tensor(LENGTHS, dtype=torch.int32), expected)
    assert torch.equal(scored.scores(at_once, plain=True), scores)
    assert_same(at_once.selection, expected.selection)


def test_a_selection_of_other_heads_is_refused(scored: Scored) -> None:
    other = wanted(Scored(scored.op, scored.plain, scored.arguments, scored.heads + 1, scored.unit))
    with pytest.raises(RuntimeError, match=rf"units.shape\[1\] must be {scored.heads}, the heads of the scores"):
        scored.scores(other)
