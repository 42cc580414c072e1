"""Tidal: where the second selection layer comes from."""

from __future__ import annotations

import pytest

from sparseserve.config import from_dict, load_policy, to_dict
from sparseserve.errors import ConfigError
from sparseserve.model import ModelShape
from sparseserve.policies import Quest, Tidal
from sparseserve.policies.tidal import RESELECTIONS
from sparseserve.types import HeadShape, Role


def selection_layers(name: str, layers: int, policy: Tidal) -> list[int]:
    model = ModelShape(name, layers, HeadShape(8, 4, 128), max_len=8192, page_size=128)
    return [plan.layer for plan in policy.plans(model) if plan.role is Role.SELECT]


@pytest.mark.parametrize(
    ("name", "layers", "layer"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 32, 13),
        ("/models/gradientai/Llama-3-8B-Instruct-Gradient-1048k/", 32, 13),
        ("meta-llama/Llama-2-7b-hf", 32, 7),
        ("Qwen/Qwen3-8B", 36, 12),
        ("Qwen/Qwen3-4B", 36, 20),
    ],
)
def test_the_published_layer_is_the_default(name: str, layers: int, layer: int) -> None:
    assert selection_layers(name, layers, Tidal()) == [2, layer]
    assert selection_layers(name, layers, Tidal(reselect_layer=(9,))) == [2, 9]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mistralai/Mistral-7B-v0.3", 32),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 80),
        ("someone/Llama-3.1-8B-pruned", 24),
        ("Qwen/Qwen3-14B", 40),
    ],
)
def test_a_model_without_one_needs_it_given(name: str, layers: int) -> None:
    with pytest.raises(ConfigError, match="reselect_layer is missing.*--set reselect_layer=N; measure"):
        selection_layers(name, layers, Tidal())
    assert selection_layers(name, layers, Tidal(reselect_layer=(11,))) == [2, 11]


def test_several_reselection_layers() -> None:
    assert selection_layers("any", 32, Tidal(reselect_layer=(9, 18, 31))) == [2, 9, 18, 31]
    policy = load_policy("tidal", ["reselect_layer=[4, 9]"], {}, "any")
    assert from_dict(to_dict(policy)) == policy == Tidal(reselect_layer=(4, 9))
    plans = policy.plans(ModelShape("any", 12, HeadShape(8, 4, 128), max_len=8192, page_size=128))
    assert [plan.role for plan in plans[3:6]] == [Role.REUSE, Role.SELECT, Role.REUSE]
    with pytest.raises(ConfigError, match="reselect_layer = 32 .*2 to 31"):
        selection_layers("any", 32, Tidal(reselect_layer=(9, 32)))


@pytest.mark.parametrize("value", ["[9, 4]", "[4, 4]", "[]", "many", "[-1]", "true", "[4, x]", "4.5"])
def test_what_is_no_list_of_layers_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="reselect_layer"):
        load_policy("tidal", [f"reselect_layer={value}"], {}, "any")


def test_every_published_layer_has_a_source_and_exists() -> None:
    assert all(row.source and 2 < row.layer < row.layers for row in RESELECTIONS)


@pytest.mark.parametrize(
    "policy", [Quest(budget_tokens=100), Tidal(budget_tokens=64, unit_tokens=64, reselect_layer=(3,))]
)
def test_a_budget_that_holds_no_unit_is_refused(policy: Quest | Tidal) -> None:
    with pytest.raises(ConfigError, match=f"budget_tokens = {policy.budget_tokens} is refused.*at least"):
        policy.plans(ModelShape("m", 4, HeadShape(2, 2, 32), 8192, 64))
