"""A layer of a step: in which order it selects and attends, and what becomes of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from sparseserve.config import from_dict
from sparseserve.decode.layer import decode_layer
from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.policies.base import SparseLayer
from sparseserve.testing.bed import Bed
from sparseserve.types import HeadShape, LayerPlan, PageTable, Role, Step

UNIT, LENGTHS = 32, [160, 320]
SELECT, REUSE, DENSE = (Role.SELECT, False), (Role.REUSE, False), (Role.DENSE, True)
SELECT_DENSE = (Role.SELECT, True)
Kind = tuple[Role, bool]  # and whether the output is dense


class Scripted(Policy):
    """Its n-th selection is unit n of every row, counted from 1; notes what it is called for."""

    name: ClassVar[str] = "scripted"
    description: ClassVar[str] = "What the script says."

    kinds: tuple[Kind, ...]
    sign: float = 1  # of what outputs become
    _calls: list[tuple[str, int]] = PrivateAttr(default_factory=list)
    _lse: list[Tensor] = PrivateAttr(default_factory=list)

    def selection_units(self, max_len: int) -> int:
        return 1

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        return tuple(LayerPlan(layer, role, dense) for layer, (role, dense) in enumerate(self.kinds))

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        self._calls.append(("select", layer.plan.layer))
        self._lse.append(step.lse.clone())
        step.selection.spans[..., 0], step.selection.spans[..., 1] = 0, step.table.seq_lens[:, None]
        step.selection.units.fill_(sum(call == "select" for call, _ in self._calls))
        step.selection.count.fill_(1)

    def after_attend(self, layer: SparseLayer, query: Tensor, step: Step, out: Tensor) -> None:
        self._calls.append(("after", layer.plan.layer))
        out.mul_(self.sign)


class Run:
    """A step of `policy`; the values of a unit are its number, so that an output tells which unit was read."""

    def __init__(self, policy: Policy, layers: int, measured: Sequence[int] = ()) -> None:
        model = ModelShape("bed", layers, HeadShape(2, 2, 64), max_len=320, page_size=64)
        random = torch.Generator().manual_seed(1)
        key = torch.randn(layers, len(LENGTHS), 320, 2, 64, generator=random).bfloat16()
        value = (torch.arange(320) // UNIT).bfloat16()[:, None, None].expand_as(key)
        bed = Bed(policy, model, LENGTHS).fill(key, value)
        query = torch.randn(len(LENGTHS), 4, 64, generator=random).bfloat16()
        step = bed.buffers.step(PageTable(bed.pages, torch.tensor(LENGTHS, dtype=torch.int32)), measured=measured)
        self.out = torch.full((layers, *query.shape), torch.nan, dtype=query.dtype)
        for layer, out in zip(bed.layers, self.out, strict=True):
            decode_layer(layer, step, query, out)
        self.measurement, self.lse = step.measurement, step.lse

    def units(self) -> list[float | None]:
        """What each layer read of all rows; None for more than one unit."""
        first = self.out[:, 0, 0, 0]
        same = (self.out == first[:, None, None, None]).flatten(1).all(1)
        return [float(value) if alone else None for value, alone in zip(first, same, strict=True)]


def scripted(*kinds: Kind, **settings: Any) -> Scripted:
    return Scripted(**{"kinds": kinds, **settings})


def dense(layers: int = 1) -> Run:
    return Run(from_dict({"policy": "dense"}), layers)


def test_a_layer_selects_and_then_attends_to_its_selection() -> None:
    policy = scripted(SELECT, SELECT)
    assert Run(policy, 2).units() == [1, 2]
    assert policy._calls == [("select", 0), ("after", 0), ("select", 1), ("after", 1)]


def test_a_layer_with_dense_output_attends_to_everything_before_it_selects() -> None:
    policy = scripted(SELECT_DENSE)
    run, everything = Run(policy, 1), dense()
    assert torch.equal(run.out, everything.out)
    assert policy._calls == [("after", 0), ("select", 0)]
    assert torch.equal(policy._lse[0], everything.lse)  # of everything, from which a selection takes its masses


def test_layers_reuse_the_latest_selection() -> None:
    policy = scripted(DENSE, SELECT_DENSE, REUSE, REUSE, SELECT, REUSE, SELECT_DENSE, REUSE)
    assert Run(policy, 8).units() == [None, None, 1, 1, 2, 2, None, 3]


def test_a_policy_changes_the_output_of_a_layer() -> None:
    assert Run(scripted(SELECT, REUSE, sign=-2), 2).units() == [-2, -2]
    assert torch.equal(Run(scripted(DENSE, sign=-1), 1).out, -dense().out)


def test_what_the_policy_made_of_an_output_is_measured() -> None:
    errors = []
    for sign in (1, -1):
        run = Run(scripted(SELECT, sign=sign, recall_sample=1), 1, measured=[0])
        assert run.measurement is not None
        errors.append(run.measurement.error[0, : len(LENGTHS)])
    assert (errors[1] > errors[0] + 0.1).all()


@pytest.mark.parametrize(
    ("guard", "replaced"),
    [
        ({}, False),
        ({"recall_floor": 1.0}, False),  # reported
        ({"recall_floor": 1.0, "recall_action": "dense"}, True),
        ({"recall_floor": 1e-6, "recall_action": "dense"}, False),
    ],
)
def test_rows_under_the_floor_take_the_dense_output_unless_they_are_to_be_reported(
    guard: dict[str, Any], replaced: bool
) -> None:
    run = Run(scripted(SELECT, REUSE, recall_sample=1, **guard), 2, measured=[1])
    assert run.measurement is not None
    recall = run.measurement.recall[1, : len(LENGTHS)]
    assert (recall > 1e-6).all() and (recall < 1).all() and run.measurement.recall[0].isnan().all()
    assert torch.equal(run.out[1], dense(2).out[1]) == replaced
    assert run.units() == [1, None if replaced else 1]  # the first layer was not measured
