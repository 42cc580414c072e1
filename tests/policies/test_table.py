"""A new policy is its class and its line in POLICIES: all that lists policies follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field
from typer.testing import CliRunner

from deploy import generate
from kernels.bench.cpu.contenders import policies as contenders
from sparseserve.cli import app
from sparseserve.config import policy_file_schema
from sparseserve.demo.circuits import LAYERS
from sparseserve.evaluation.evaluation import settings
from sparseserve.model import ModelShape
from sparseserve.policies import POLICIES, Policy
from sparseserve.tuning.search import candidates, families, with_budgets
from sparseserve.types import LayerPlan, Role
from tests.helpers.contract import CASES


class Toy(Policy):
    """Attends to everything, whatever is asked for."""

    name: ClassVar[str] = "toy"
    description: ClassVar[str] = "What the toy reads."
    papers: ClassVar[dict[str, str]] = {"Toy": "https://example.org/toy"}

    toy_tokens: int = Field(512, description="the toy's budget")

    @property
    def budget(self) -> int:
        return self.toy_tokens

    def at_budget(self, tokens: int) -> dict[str, int]:
        return {"toy_tokens": tokens}

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        return tuple(LayerPlan(layer, Role.DENSE, dense_output=True) for layer in range(model.layers))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "toy", Toy)


def test_names_are_those_of_the_classes() -> None:
    assert {name: cls.name for name, cls in POLICIES.items()} == {name: name for name in POLICIES}


def test_every_policy_is_held_to_the_laws() -> None:
    assert [name for name in POLICIES if name not in {policy.name for policy in CASES.values()}] == []


@pytest.mark.usefixtures("toy")
def test_a_new_policy_is_in_both_schemas() -> None:
    assert "toy_tokens" in policy_file_schema()["$defs"]["Toy"]["properties"]
    assert generate.policy_schema() == json.dumps(policy_file_schema(), indent=2) + "\n"
    values = json.loads(generate.values_schema())
    chosen = values["definitions"]["policy"]
    assert chosen["properties"]["policy"]["enum"] == list(POLICIES) and "toy" in POLICIES
    assert chosen["allOf"][-1]["then"] == {"$ref": "#/$defs/Toy"} and "Toy" in values["$defs"]


@pytest.mark.usefixtures("toy")
def test_a_new_policy_is_in_the_tables_of_the_documents() -> None:
    readme = generate.readme(generate.README.read_text())
    assert "| `toy` | What the toy reads. | [Toy](https://example.org/toy) |\n" in readme
    assert "| `toy` | yes | yes | no |\n" in readme
    assert "| `dense`, `tidal`, `s2`, `toy` | 8192 | 8192 | 8192 |" in generate.runbook(generate.RUNBOOK.read_text())


@pytest.mark.usefixtures("toy")
def test_a_new_policy_is_listed_with_its_settings() -> None:
    run = CliRunner().invoke
    assert "toy_tokens=512" in run(app, ["policies"], env={"COLUMNS": "160"}).output
    *_, described = json.loads(run(app, ["policies", "--json"]).output)
    assert (described["name"], described["paper"]) == ("toy", "https://example.org/toy")


@pytest.mark.usefixtures("toy")
def test_a_new_policy_is_evaluated_at_budgets() -> None:
    assert [str(one) for one in settings("toy", [256, 512])] == ["toy:toy_tokens=256", "toy:toy_tokens=512"]


@pytest.mark.usefixtures("toy")
def test_a_new_policy_is_tuned_from_its_largest_budget_down() -> None:
    assert candidates() == "dense,streaming,quest,hip,toy"
    *_, family = families(with_budgets(settings(candidates(), []), [1024]))
    assert [str(one) for one in family] == ["toy:toy_tokens=512", "toy:toy_tokens=256"]


@pytest.mark.usefixtures("toy")
def test_a_new_policy_is_measured(tmp_path: Path) -> None:
    assert contenders(tmp_path, LAYERS)["toy"] == Toy()
