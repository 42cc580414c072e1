"""Policies with a budget: what it may be, how it widens, and how many units fill it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sparseserve.config import from_dict
from sparseserve.decode.step import StepBuffers
from sparseserve.errors import ConfigError
from sparseserve.model import ModelShape
from sparseserve.policies import BudgetPolicy, Quest
from sparseserve.types import Budgets, HeadShape, PageTable, Role, Scope

MODEL = ModelShape("m", 4, HeadShape(3, 2, 64), max_len=8192, page_size=64)
FLOOR = {"recall_sample": 0.5, "recall_floor": 0.9}
WIDEN = FLOOR | {"recall_action": "widen"}


def quest(**changes: Any) -> Quest:
    return Quest(**{"budget_tokens": 512, "sink_tokens": 16, "recent_tokens": 64, "unit_tokens": 32} | changes)


def tidal(scope: Scope) -> BudgetPolicy:
    policy = from_dict({"policy": "tidal", "reselect_layer": 3, "scope": scope.value})
    assert isinstance(policy, BudgetPolicy)
    return policy


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sink_tokens": 500}, "= 564 exceed budget_tokens = 512; raise the budget or keep fewer"),
        ({"recent_tokens": 497}, "= 513 exceed budget_tokens = 512; raise the budget or keep fewer"),
        ({"max_budget_tokens": 511}, "max_budget_tokens = 511 is less than budget_tokens = 512; raise it, or drop it"),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(wrong: dict[str, int], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        quest(**wrong)


def test_the_bounds_themselves_are_allowed() -> None:
    assert quest(recent_tokens=496).budget == 512
    assert quest(max_budget_tokens=512).largest_budget == 512


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({}, 2048),
        ({"max_budget_tokens": 700}, 700),
        ({"per_request": False}, 512),
        ({"per_request": False, "max_budget_tokens": 700}, 512),  # nobody may have it
        ({"per_request": False, "max_budget_tokens": 700, **FLOOR, "recall_action": "dense"}, 512),
        ({"per_request": False, "max_budget_tokens": 700, **WIDEN}, 700),  # the guard gives it
        ({"per_request": False, **WIDEN}, 2048),
    ],
)
def test_the_largest_budget_is_one_that_somebody_may_have(settings: dict[str, Any], largest: int) -> None:
    assert quest(**settings).budgets == Budgets(default=512, least=16 + 64 + 32, largest=largest)


@pytest.mark.parametrize(
    ("start", "steps"),
    [(None, [1024, 1500]), (512, [1024, 1500]), (200, [400, 800, 1500]), (749, [1498, 1500]), (1500, []), (9999, [])],
)
def test_a_budget_doubles_up_to_the_largest_and_then_no_more(start: int | None, steps: list[int]) -> None:
    budgets = quest(max_budget_tokens=1500).budgets
    assert budgets is not None
    for wider in (*steps, None):
        assert budgets.wider(start) == wider
        start = wider


@pytest.mark.parametrize("max_len", [1, 300, 513, 1000, 8192])
@pytest.mark.parametrize("largest", [512, 1000, 2048])
def test_a_selection_has_room_for_the_largest_budget_of_the_longest_row_and_no_more(largest: int, max_len: int) -> None:
    policy = quest(max_budget_tokens=largest)
    needed = max((min(largest, max_len), 512)) - 16 - 64  # the plan's own budget always has room
    assert policy.selection_units(max_len) == needed // 32
    assert policy.scored_units(max_len) == len(range(0, max_len, 32))


@pytest.mark.parametrize(("min_tokens", "dense"), [(0, 512), (512, 512), (2000, 2000)])
def test_rows_up_to_the_budget_are_dense(min_tokens: int, dense: int) -> None:
    policy = quest(min_tokens=min_tokens)
    assert policy.dense_up_to == policy.row_dense_up_to(None) == dense
    assert [policy.row_dense_up_to(own) for own in (128, 4000)] == [max(min_tokens, 128), 4000]


def test_layers_that_select_read_the_budget_at_most() -> None:
    policy = quest(dense_layers=1)
    dense, select, *_ = policy.plans(MODEL)
    assert [policy.expected_tokens(dense, length) for length in (100, 5000)] == [100, 5000]
    assert [policy.expected_tokens(select, length) for length in (100, 512, 5000)] == [100, 512, 512]
    assert quest(**policy.at_budget(700)).budget == 700


@pytest.mark.parametrize(("scope", "heads"), [(Scope.ALL_HEADS, 1), (Scope.KV_HEAD, 3), (Scope.QUERY_HEAD, 6)])
def test_a_plan_has_the_budget_of_each_head_that_selects(scope: Scope, heads: int) -> None:
    plan = tidal(scope).select_plan(2, MODEL.heads, dense_output=True)
    assert (plan.layer, plan.role, plan.dense_output) == (2, Role.SELECT, True)
    for limit, tokens in ((plan.sink, 0), (plan.recent, 1), (plan.budget, 1024)):
        assert limit is not None and limit.dtype is torch.int32 and limit.tolist() == [tokens] * heads


@pytest.mark.parametrize("unit", [16, 32, 64])
def test_a_budget_holds_a_unit_beside_sink_and_recent_tokens(unit: int) -> None:
    least = 16 + 64 + unit
    quest(budget_tokens=least, unit_tokens=unit).check_budget()
    with pytest.raises(ConfigError) as error:
        quest(budget_tokens=least - 1, unit_tokens=unit).check_budget()
    problem = error.value.problem
    assert (problem.key, problem.value) == ("budget_tokens", least - 1)
    assert problem.allowed == f"at least {least}: a unit of {unit} tokens beside sink and recent tokens"
    assert problem.remedy == "give --set budget_tokens=2048"


def test_what_is_wanted_is_the_plans_with_the_budgets_of_the_rows() -> None:
    policy = quest(dense_layers=0)
    plan, *others = policy.plans(MODEL)
    table = PageTable(torch.zeros(2, 8, dtype=torch.int32), torch.tensor([500, 90], dtype=torch.int32))
    buffers = StepBuffers(policy, [plan, *others], MODEL.heads, 2, MODEL.max_len)
    step = buffers.step(table, row_budget=torch.tensor([0, 128], dtype=torch.int32))
    wanted = policy.wanted(plan, step, threshold=-3.0)
    assert wanted.selection is step.selection and wanted.row_budget is step.row_budget
    assert (wanted.sink, wanted.recent, wanted.budget) == (plan.sink, plan.recent, plan.budget)
    assert wanted.threshold == -3 and policy.wanted(plan, step).threshold is None
