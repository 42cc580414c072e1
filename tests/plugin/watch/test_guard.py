"""Which steps are measured, and what the guard makes of requests that stay under the floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseserve.model import ModelShape
from sparseserve.plugin.watch import metrics
from sparseserve.plugin.watch.recall import EVERY, GROUPS, CudaRecall, Recall
from sparseserve.plugin.watch.requests import ServedRequest
from sparseserve.policies import Dense, Policy, Quest, Tidal
from sparseserve.request_options import RequestOptions
from sparseserve.types import HeadShape, Measurement
from tests.helpers.plugin.worker_metrics import value

pytestmark = pytest.mark.vllm
MODEL = ModelShape("model", 16, HeadShape(2, 2, 64), 32768, 64)


def quest(**changes: Any) -> Quest:
    return Quest(**{"budget_tokens": 512, "recall_sample": 1.0, "recall_floor": 0.9} | changes)


def plans(policy: Policy) -> list[Any]:
    return list(policy.plans(MODEL))


def plain() -> ServedRequest:
    return ServedRequest.of(RequestOptions())


def measured(recall: list[float], error: float = 0.1) -> Measurement:
    """The same numbers in all layers, for a row each."""
    rows = torch.tensor(recall).expand(MODEL.layers, -1)
    return Measurement((), torch.empty(0), rows, torch.full_like(rows, error))


def sampled(recall: Recall, requests: list[ServedRequest], kept: list[float], times: int = 1) -> None:
    """Samples in succession."""
    for _ in range(times):
        draw = recall.draw()
        assert draw is not None
        recall.expect(draw, requests)
        recall.observe(measured(kept))


def count(name: str, **labels: str) -> float:
    return value(f"sparseserve_{name}_total", policy="quest", **labels)


def test_a_share_of_the_steps_measures_a_quarter_of_the_layers_in_turn() -> None:
    policy = quest(recall_sample=0.1)
    recall = Recall(policy, plans(policy))
    draws = [draw for draw in (recall.draw() for _ in range(5000)) if draw is not None]
    assert 400 < len(draws) < 600
    assert [draw.group for draw in draws[:8]] == [1, 2, 3, 0] * 2
    assert {draw.layers for draw in draws} == {(2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)}


def test_a_share_of_one_measures_everything_and_none_nothing() -> None:
    everything, nothing = (
        Recall(policy, plans(policy)) for policy in (quest(), quest(recall_sample=0.0, recall_floor=None))
    )
    assert [everything.draw() for _ in range(3)] == [everything.draw()] * 3
    draw = everything.draw()
    assert draw is not None and (draw.group, draw.layers) == (EVERY, tuple(range(2, 16)))
    assert not any(nothing.draw() for _ in range(1000))
    assert not Recall(Dense(recall_sample=1), plans(Dense())).draw()


def test_layers_that_attend_to_everything_are_not_measured() -> None:
    policy = Tidal(select_layer=2, reselect_layer=(9,), recall_sample=0.5)
    recall = Recall(policy, plans(policy))
    assert recall.layers == tuple(layer for layer in range(3, 16) if layer != 9)
    assert len({draw.group for draw in (recall.draw() for _ in range(99)) if draw}) == GROUPS


def test_one_sample_under_the_floor_may_be_chance() -> None:
    policy = quest(recall_action="dense")
    recall, request = Recall(policy, plans(policy)), plain()
    for kept in (0.5, 0.95, 0.5, 0.95):
        sampled(recall, [request], [kept])
    assert not request.dense and request.recall == pytest.approx(0.95)
    sampled(recall, [request], [0.5], times=2)
    assert request.dense and request.reason == "recall"


def test_groups_are_judged_apart() -> None:
    """A request that is low in one group of layers only is low, though other groups are measured in between."""
    policy = quest(recall_sample=0.999, recall_action="dense")
    recall, request = Recall(policy, plans(policy)), plain()
    seen: list[int] = []
    while len(seen) < 8 and not request.dense:
        if (draw := recall.draw()) is None:
            continue
        recall.expect(draw, [request])
        recall.observe(measured([0.2 if draw.group == 2 else 0.99]))
        seen.append(draw.group)
    assert request.dense and seen.count(2) == 2


def test_budgets_double_up_to_the_largest_then_the_request_is_dense() -> None:
    policy = quest(recall_action="widen", max_budget_tokens=1500)
    recall, request, fine = Recall(policy, plans(policy)), plain(), plain()
    before = count("budget_widened"), count("dense_fallback", reason="budget")
    under = count("under_floor", action="widen")
    budgets = []
    for _ in range(3):
        sampled(recall, [request, fine], [0.5, 0.95], times=2)
        budgets.append((request.budget_tokens, request.dense))
    assert budgets == [(1024, False), (1500, False), (1500, True)]
    assert request.widened == 2 and request.reason == "budget" and fine.plain
    assert count("budget_widened") == before[0] + 2
    assert count("dense_fallback", reason="budget") == before[1] + 1
    assert count("under_floor", action="widen") == under + 1  # a request counts once
    sampled(recall, [request], [0.5], times=5)
    assert count("dense_fallback", reason="budget") == before[1] + 1


def test_a_budget_that_a_request_asked_for_is_widened_from_there() -> None:
    policy = quest(recall_action="widen")
    recall, request = Recall(policy, plans(policy)), ServedRequest.of(RequestOptions(budget_tokens=256))
    sampled(recall, [request], [0.5], times=2)
    assert request.budget_tokens == 512 and request.widened == 1


def test_reporting_changes_nothing() -> None:
    policy = quest()
    recall, request = Recall(policy, plans(policy)), plain()
    before = count("under_floor", action="report")
    sampled(recall, [request], [0.1], times=9)
    assert request.plain and count("under_floor", action="report") == before + 1


def test_rows_that_were_not_compared_are_neither_counted_nor_judged() -> None:
    policy = quest(recall_action="dense")
    recall, request = Recall(policy, plans(policy)), plain()
    metrics.RECALL.labels("quest", "0-3")  # is there from now on
    rows = value("sparseserve_attention_recall_count", policy="quest", layers="0-3")
    sampled(recall, [request, plain()], [float("nan"), 0.95], times=3)
    counted = value("sparseserve_attention_recall_count", policy="quest", layers="0-3") - rows
    assert counted == 3 * 2  # layers 2 and 3 of the group
    assert request.recall is None and request.plain


def test_numbers_of_a_gpu_come_with_a_later_step() -> None:
    policy = quest(recall_sample=0.999, recall_action="dense")
    buffers = measured([0.5, 0.95])
    recall, low, fine = CudaRecall(policy, plans(policy), buffers), plain(), plain()
    while (draw := recall.draw()) is None:
        pass
    recall.expect(draw, [low, fine])
    assert recall.draw() is None and low.recall is None  # one at a time
    recall.collect()
    assert low.recall == pytest.approx(0.5) and fine.recall == pytest.approx(0.95)
