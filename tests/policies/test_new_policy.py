"""A policy in a file of its own, with nothing else changed, keeps the contract and serves a step."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from sparseserve.config import load_policy, policy_file_schema
from sparseserve.policies import POLICIES
from tests.helpers.contract import BUDGET, RECENT, SINK
from tests.helpers.laws import LAWS, Data

TOY = '''
"""The earliest units, whatever they hold."""

from typing import ClassVar

import torch
from torch import Tensor

from sparseserve import ops
from sparseserve.model import ModelShape
from sparseserve.policies.budget import ScorePolicy
from sparseserve.policies.base import SparseLayer
from sparseserve.types import LayerPlan, Scope, Step


class Toy(ScorePolicy):
    """Fills the budget with the units that come first."""

    name: ClassVar[str] = "toy"
    description: ClassVar[str] = "The earliest units."

    @property
    def head_scope(self) -> Scope:
        return Scope.KV_HEAD

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        return tuple(self.select_plan(layer, model.heads) for layer in range(model.layers))

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        step.scores.copy_(-torch.arange(step.scores.shape[2], device=query.device))
        ops.select_units(step.scores, step.table.seq_lens, self.wanted(layer.plan, step))
'''
SETTINGS = [f"budget_tokens={BUDGET}", f"sink_tokens={SINK}", f"recent_tokens={RECENT}"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and its line in the table."""
    (file := tmp_path / "toy.py").write_text(TOY)
    spec = spec_from_file_location("toy", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(POLICIES, "toy", module.Toy)


@pytest.mark.usefixtures("toy", "device")
@pytest.mark.parametrize("law", LAWS)
def test_a_new_policy_serves_a_step_by_every_law(law: str, data: Data) -> None:
    LAWS[law](load_policy("toy", SETTINGS, {}, "any model"), data)


@pytest.mark.usefixtures("toy")
def test_a_new_policy_can_be_asked_for_in_a_file() -> None:
    assert "toy" in str(policy_file_schema())
