"""What selections lose against dense attention, as decode steps measure it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseserve.config import from_dict, to_dict
from sparseserve.policies import BudgetPolicy, Dense, Policy, Quest
from sparseserve.policies.window import WindowPolicy
from sparseserve.testing.bed import Bed, Outcome
from tests.helpers.contract import CASES, LENGTHS, MODEL

pytestmark = pytest.mark.usefixtures("device")
ROWS = [row for row, length in enumerate(LENGTHS) if length]
BUDGETED = [name for name, policy in CASES.items() if policy.budgets is not None]


def measuring(policy: Policy, **changes: object) -> Policy:
    shared = {"kv_memory": "shared"} if isinstance(policy, WindowPolicy) else {}
    return policy.model_copy(update={"recall_sample": 1, **shared, **changes})


def sparse_layers(policy: Policy) -> list[int]:
    return [plan.layer for plan in policy.plans(MODEL) if not plan.dense_output]


def weights(query: Tensor, key: Tensor) -> Tensor:
    """Of all T tokens of a row, [Hq, T] fp64: query [Hq, D], key [T, H, D]."""
    keys = key.double().repeat_interleave(query.shape[0] // key.shape[1], 1)
    scale: float = query.shape[1] ** -0.5
    return (torch.einsum("hd,thd->ht", query.double(), keys) * scale).softmax(1)


def exactly(outcome: Outcome, layer: int, row: int, data: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Recall and error of a row by the definition, in fp64."""
    query, key, value = (part[layer, row] for part in data)
    key, value = key[: LENGTHS[row]], value[: LENGTHS[row]]
    every, mask = weights(query, key), outcome.masks[layer][row, :, : LENGTHS[row]]
    kept = (every * mask.repeat_interleave(len(every) // len(mask), 0)).sum(1).mean()
    dense = torch.einsum("ht,thd->hd", every, value.double().repeat_interleave(len(every) // value.shape[1], 1))
    lost = (outcome.out[layer, row].double() - dense).norm(dim=1) / dense.norm(dim=1)
    return float(kept), float(lost.mean())


@pytest.mark.parametrize("name", CASES)
def test_what_is_lost_is_measured(name: str, data: tuple[Tensor, Tensor, Tensor]) -> None:
    policy = measuring(CASES[name])
    outcome = Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0])
    for layer in sparse_layers(policy):
        assert outcome.measurement is not None
        for row in ROWS:
            kept, lost = exactly(outcome, layer, row, data)
            assert float(outcome.measurement.recall[layer, row]) == pytest.approx(kept, abs=1e-4)
            assert float(outcome.measurement.error[layer, row]) == pytest.approx(lost, abs=0.01)
    plain = Bed(CASES[name], MODEL, LENGTHS).fill(*data[1:]).decode(data[0])
    assert torch.equal(outcome.out, plain.out)  # measuring changes no answer


def test_nothing_is_lost_where_everything_is_attended_to(data: tuple[Tensor, Tensor, Tensor]) -> None:
    policy = measuring(Quest(dense_layers=0, budget_tokens=MODEL.max_len))
    measured = Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0]).measurement
    assert measured is not None
    torch.testing.assert_close(measured.recall[:, ROWS], torch.ones(MODEL.layers, len(ROWS)))
    assert not measured.error[:, ROWS].any()
    assert sparse_layers(Dense()) == []


def test_rows_without_tokens_have_no_numbers(data: tuple[Tensor, Tensor, Tensor]) -> None:
    policy = measuring(Quest(dense_layers=1, budget_tokens=128))
    measured = Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0]).measurement
    assert measured is not None
    empty = [row for row, length in enumerate(LENGTHS) if not length]
    assert empty and measured.recall[1:, empty].isnan().all() and measured.recall[0].isnan().all()


@pytest.mark.parametrize("action", ["dense", "widen"])
def test_rows_under_the_floor_take_the_dense_output_at_once(action: str, data: tuple[Tensor, Tensor, Tensor]) -> None:
    base = Quest(dense_layers=1, budget_tokens=128, sink_tokens=16, recent_tokens=32, min_tokens=0)
    reported, dense = (
        Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0]) for policy in (measuring(base), Dense(min_tokens=0))
    )
    assert reported.measurement is not None
    recall = reported.measurement.recall[1].clone()
    floor = float(recall[ROWS].median())
    guarded = measuring(base, recall_floor=floor, recall_action=action)
    out = Bed(guarded, MODEL, LENGTHS).fill(*data[1:]).decode(data[0]).out
    under = recall < floor
    assert under.any() and (recall[ROWS] >= floor).any()
    assert torch.equal(out[1, under], dense.out[1, under])
    assert torch.equal(out[1, ~under], reported.out[1, ~under])


@pytest.mark.parametrize("name", BUDGETED)
def test_a_row_with_a_budget_of_its_own_is_the_policy_with_that_budget(
    name: str, data: tuple[Tensor, Tensor, Tensor]
) -> None:
    policy = CASES[name]
    assert isinstance(policy, BudgetPolicy) and policy.budgets is not None
    least, most = policy.budgets.least, policy.budgets.largest
    budgets = [0, policy.budget_tokens + policy.selection_unit, least, most, 0, 2 * policy.budget_tokens]
    mine = torch.tensor([budgets[row % len(budgets)] for row in range(len(LENGTHS))], dtype=torch.int32)
    mixed = Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0], row_budget=mine)
    for budget in set(budgets):
        rows = [row for row in ROWS if int(mine[row]) == budget]
        tokens = budget or policy.budget_tokens
        alone = from_dict(to_dict(policy) | {"budget_tokens": tokens, "max_budget_tokens": None})
        expected = Bed(alone, MODEL, LENGTHS).fill(*data[1:]).decode(data[0])
        assert torch.equal(mixed.out[:, rows], expected.out[:, rows])
        for one, other in zip(mixed.attended, expected.attended, strict=True):
            assert torch.equal(one[rows], other[rows])
