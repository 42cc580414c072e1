"""What selections lose while serving, and what becomes of a request that loses too much."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.plugin.watch import metrics
from sparseserve.plugin.watch.requests import ServedRequest
from sparseserve.policies import Policy
from sparseserve.types import LayerPlan, Measurement

GROUPS = 4  # of neighbouring layers, measured in turn
PATIENCE = 2  # samples in succession under the floor until the guard acts: one may be chance
EVERY = -1  # stands for all groups where every layer of every step is measured


@dataclass(frozen=True, slots=True)
class Draw:
    """The layers that a step measures."""

    group: int
    layers: tuple[int, ...]


class Recall:
    """Draws what is measured and judges the requests by it."""

    def __init__(self, policy: Policy, plans: Sequence[LayerPlan]) -> None:
        self._policy, self._random, self._turn = policy, random.Random(0), 0
        self._pending: tuple[Draw, Sequence[ServedRequest | None]] | None = None
        size = -(-len(plans) // GROUPS)
        parts = [plans[first : first + size] for first in range(0, len(plans), size)]
        measured = {part: tuple(plan.layer for plan in plans if not plan.dense_output) for part, plans in _named(parts)}
        self._group_of = {layer: part for part, layers in measured.items() for layer in layers}
        self.layers = tuple(self._group_of)  # that can be measured
        groups = [layers for layers in measured.values() if layers]
        self._draws = [Draw(number, layers) for number, layers in enumerate(groups)]
        self._dense: list[int] = []  # layers that keep everything by definition, counted where every layer is
        if policy.recall_sample == 1 and self._draws:
            self._draws = [Draw(EVERY, self.layers)]
            self._dense = [plan.layer for plan in plans if plan.dense_output]
            for plan in plans:
                metrics.LAYER_RECALL.labels(policy.name, plan.layer)
        metrics.RECALL_FLOOR.labels(policy.name).set(policy.recall_floor or 0)
        if policy.recall_floor is not None:  # from 0 on: scrapers miss the first of a counter that appears with it
            metrics.UNDER_FLOOR.labels(policy.name, policy.recall_action)
            metrics.BUDGET_WIDENED.labels(policy.name)
            for reason in ("recall", "budget"):
                metrics.DENSE_FALLBACK.labels(policy.name, reason)

    def draw(self) -> Draw | None:
        """What the next step measures; None for most."""
        if not self._draws or self._random.random() >= self._policy.recall_sample:
            return None
        self._turn += 1
        return self._draws[self._turn % len(self._draws)]

    def expect(self, draw: Draw, requests: Sequence[ServedRequest | None]) -> None:
        """Remember whose rows [B] a step measures."""
        self._pending = draw, requests

    def observe(self, measurement: Measurement) -> None:
        """Count a step's numbers and judge its requests."""
        if self._pending is None:
            return
        draw, requests = self._pending
        self._pending = None
        recall, error = (numbers[list(draw.layers)].tolist() for numbers in (measurement.recall, measurement.error))
        for layer, *rows in zip(draw.layers, recall, error, strict=True):
            self._count(layer, *rows)
        for layer in self._dense:
            for _ in filter(_is_number, recall[0]):
                metrics.LAYER_RECALL.labels(self._policy.name, layer).observe(1)
        for row, request in enumerate(requests):
            kept = min(layer[row] for layer in recall)
            if request is not None and _is_number(kept):
                self._judge(request, draw.group, kept)

    def _count(self, layer: int, recall: list[float], error: list[float]) -> None:
        name = self._policy.name
        by_group = name, self._group_of[layer]
        recalls, errors = metrics.RECALL.labels(*by_group), metrics.OUTPUT_ERROR.labels(*by_group)
        of_layer = metrics.LAYER_RECALL.labels(name, layer)
        for kept, lost in zip(recall, error, strict=True):
            if _is_number(kept):
                recalls.observe(kept)
                errors.observe(lost)
                of_layer.observe(kept)

    def _judge(self, request: ServedRequest, group: int, kept: float) -> None:
        request.recall = kept
        floor = self._policy.recall_floor
        if floor is None or request.dense:
            return
        request.low[group] = request.low.get(group, 0) + 1 if kept < floor else 0
        if request.low[group] < PATIENCE:
            return
        request.low.clear()
        if not request.under_floor:
            request.under_floor = True
            metrics.UNDER_FLOOR.labels(self._policy.name, self._policy.recall_action).inc()
        self._act(request)

    def _act(self, request: ServedRequest) -> None:
        action = self._policy.recall_action
        budgets = self._policy.budgets
        if action == "widen" and budgets and (wider := budgets.wider(request.budget_tokens)):
            request.budget_tokens, request.widened = wider, request.widened + 1
            metrics.BUDGET_WIDENED.labels(self._policy.name).inc()
        elif action != "report":
            request.dense, request.reason = True, "budget" if action == "widen" else "recall"
            metrics.DENSE_FALLBACK.labels(self._policy.name, request.reason).inc()


class CudaRecall(Recall):
    """Numbers come from the GPU after their step; no step waits for them, unless every one is measured."""

    def __init__(self, policy: Policy, plans: Sequence[LayerPlan], measurement: Measurement | None) -> None:
        super().__init__(policy, plans)
        if measurement is None:
            self._draws, self.layers = [], ()
            return
        self._measured = measurement
        pinned = measurement.recall.device.type == "cuda"
        self._arriving = torch.empty(2, *measurement.recall.shape, pin_memory=pinned)
        self._arrived = torch.cuda.Event() if pinned else None
        self._asked = False

    def draw(self) -> Draw | None:
        return super().draw() if self._pending is None else None

    def collect(self) -> None:
        """Take what has arrived; called before the buffers of the next step are written."""
        if self._pending is None:
            return
        if not self._asked:
            for target, numbers in zip(self._arriving, (self._measured.recall, self._measured.error), strict=True):
                target.copy_(numbers, non_blocking=True)  # whole: a part with gaps would wait for the GPU
            self._asked = True
            if self._arrived is not None:
                self._arrived.record()
        if self._arrived is None or self._here(self._arrived):
            self._asked = False
            rows = slice(len(self._pending[1]))
            recall, error = self._arriving[:, :, rows]
            self.observe(Measurement((), self._measured.spans, recall, error))

    def _here(self, event: torch.cuda.Event) -> bool:
        if self._policy.recall_sample == 1:
            event.synchronize()
        done: bool = event.query()
        return done


def _is_number(value: float) -> bool:
    """Whether a row was compared; rows of padding and rows that attend to everything have NaN."""
    return value == value


def _named(parts: Sequence[Sequence[LayerPlan]]) -> list[tuple[str, Sequence[LayerPlan]]]:
    return [(f"{part[0].layer}-{part[-1].layer}", part) for part in parts]


def rows_of(requests: Sequence[ServedRequest | None], chosen: Tensor) -> list[ServedRequest | None]:
    """The requests of rows `chosen` [B] int64."""
    return [requests[row] for row in chosen.tolist()]
