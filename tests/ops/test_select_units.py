"""select_units: exactly the reference, whatever the scores are."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseserve import ops, reference
from sparseserve.types import Selection, Wanted


def select(function: Callable[..., object], scores: torch.Tensor, lengths: list[int], bounds: torch.Tensor, slots: int,
           unit: int, threshold: float | None = None, row_budget: list[int] | None = None) -> Selection:  # fmt: skip
    selection = Selection.empty(len(lengths), scores.shape[1], slots, unit)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    own = None if row_budget is None else torch.tensor(row_budget, dtype=torch.int32)
    sink, recent, budget = bounds.int()
    function(scores, seq_lens, Wanted(selection, sink, recent, budget, threshold, own))
    return selection


def assert_same(one: Selection, other: Selection) -> None:
    for name in ("spans", "units", "count"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_reference(device: str, data: st.DataObject) -> None:
    draw = data.draw
    unit, heads, rows = draw(st.sampled_from([1, 16, 32, 64])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 40 * unit), min_size=rows, max_size=rows))
    sink = torch.tensor(draw(st.lists(st.integers(0, 3 * unit), min_size=heads, max_size=heads)))
    recent = torch.tensor(draw(st.lists(st.integers(0, 3 * unit), min_size=heads, max_size=heads)))
    extra = torch.tensor(draw(st.lists(st.integers(0, 20 * unit), min_size=heads, max_size=heads)))
    # Few values, so that ties are common.
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, torch.nan, torch.inf, -torch.inf])
    scores = values[
        torch.randint(8, (rows, heads, 41), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    ]
    bounds = torch.stack([sink, recent, sink + recent + extra])
    threshold = draw(st.sampled_from([None, -torch.inf, -1.0, 0.0, 0.5]))
    slots = 40 if threshold is not None else draw(st.integers(1, 25))
    both = ops.select_units, reference.select_units
    # None, less than sink and recent tokens, and up to more than the length.
    budgets = st.one_of(st.just(0), st.integers(1, 3 * unit), st.integers(1, 45 * unit))
    own = draw(st.none() | st.lists(budgets, min_size=rows, max_size=rows))
    assert_same(*(select(function, scores, lengths, bounds, slots, unit, threshold, own) for function in both))


def test_ties_go_to_the_lower_unit(device: str) -> None:
    scores = torch.zeros(1, 1, 64)
    selection = select(ops.select_units, scores, [64 * 16], torch.tensor([[32], [16], [32 + 16 + 5 * 16]]), 64, 16)
    assert selection.units[0, 0, :5].tolist() == [2, 3, 4, 5, 6]
    assert selection.spans[0, 0].tolist() == [32, 63 * 16]


def test_a_threshold_replaces_the_budget(device: str) -> None:
    scores = torch.tensor([[[3.0, -1.0, torch.inf, 0.5, 0.5001, torch.nan, 9.0]]])
    selection = select(ops.select_units, scores, [97], torch.tensor([[0], [0], [16]]), 7, 16, threshold=0.5)
    assert selection.units[0, 0, : selection.count[0, 0]].tolist() == [0, 2, 4, 6]
    assert selection.spans[0, 0].tolist() == [0, 97]
    short = select(ops.select_units, scores, [16], torch.tensor([[4], [8], [64]]), 7, 16, threshold=3.0)
    assert short.count.item() == 0 and short.spans[0, 0].tolist() == [4, 8]  # no row is too short for a threshold


def test_a_threshold_needs_room_for_every_unit() -> None:
    with pytest.raises(RuntimeError, match="too small for every unit"):
        select(ops.select_units, torch.zeros(1, 1, 7), [97], torch.tensor([[0], [0], [16]]), 6, 16, threshold=0.5)


def test_nan_is_the_lowest_score(device: str) -> None:
    scores = torch.tensor([[[torch.nan, -5.0, torch.nan, -torch.inf, 3.0, 0.0]]])
    selection = select(ops.select_units, scores, [6], torch.tensor([[0], [1], [4]]), 8, 1)
    assert selection.units[0, 0, :3].tolist() == [0, 1, 4]


def test_large_rows_and_strided_scores(device: str) -> None:
    scores = torch.randn(3, 8, 40000, generator=torch.Generator().manual_seed(0))[:, ::2, :33000]
    bounds = torch.tensor([[4] * 4, [64] * 4, [1024, 2048, 128, 30000]])
    pair = (select(f, scores, [32768, 1000, 0], bounds, 4000, 1) for f in (ops.select_units, reference.select_units))
    assert_same(*pair)


def test_short_rows_are_selected_whole(device: str) -> None:
    scores = torch.full((2, 1, 10), torch.nan)
    selection = select(ops.select_units, scores, [0, 100], torch.tensor([[4], [8], [100]]), 4, 32)
    assert selection.spans.tolist() == [[[0, 0]], [[100, 100]]] and selection.count.tolist() == [[0], [0]]


@pytest.mark.parametrize("budget", [96, 100, 300, 900, 1000])
def test_a_budget_of_every_row_is_a_budget(device: str, budget: int) -> None:
    scores = torch.randn(3, 2, 63, generator=torch.Generator().manual_seed(0))
    plan = torch.tensor([[4, 32], [64, 64], [400, 96]])
    same = plan.clone()
    same[2] = budget
    lengths = [1000, 120, 0]
    own = select(ops.select_units, scores, lengths, plan, 60, 16, row_budget=[budget] * 3)
    assert_same(own, select(ops.select_units, scores, lengths, same, 60, 16))
    assert own.count[0].tolist() == [(budget - 68) // 16, (budget - 96) // 16] if budget < 1000 else [0, 0]


@pytest.mark.parametrize("threshold", [None, -1.0])
def test_rows_within_their_own_budget_are_selected_whole(device: str, threshold: float | None) -> None:
    scores, bounds = torch.zeros(3, 1, 10), torch.tensor([[1], [2], [4]])
    selection = select(ops.select_units, scores, [10] * 3, bounds, 10, 1, threshold, row_budget=[0, 10, 11])
    assert selection.spans[:, 0].tolist() == [[1, 8], [10, 10], [10, 10]]
    assert selection.count.flatten().tolist() == [1 if threshold is None else 7, 0, 0]


def test_under_a_threshold_a_smaller_budget_of_a_row_changes_nothing(device: str) -> None:
    scores, bounds = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([[1], [2], [4]])
    plain, own = (select(ops.select_units, scores, [10, 10], bounds, 10, 1, 0.0, of) for of in (None, [9, 1]))
    assert_same(plain, own)
    assert plain.count.all()


def test_sink_and_recent_tokens_are_taken_whatever_the_budget_of_a_row(device: str) -> None:
    bounds = torch.tensor([[3], [4], [9]])
    selection = select(ops.select_units, torch.zeros(3, 1, 10), [10, 6, 2], bounds, 10, 1, row_budget=[2, 1, 1])
    assert selection.spans[:, 0].tolist() == [[3, 6], [3, 3], [2, 2]] and not selection.count.any()


def test_scores_must_hold_the_longest_row() -> None:
    with pytest.raises(RuntimeError, match="too small"):
        select(ops.select_units, torch.zeros(1, 1, 3), [100], torch.tensor([[4], [8], [64]]), 4, 32)
