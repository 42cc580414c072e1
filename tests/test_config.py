"""Policies as users ask for them: by name, by file, changed by flags and environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseserve.config import find_policy, from_dict, load_policy, policy_file_schema, to_dict
from sparseserve.errors import ConfigError
from sparseserve.policies import POLICIES, Quest, Streaming, Tidal
from sparseserve.types import Scope

TIDAL = ["reselect_layer=13"]
FILE = """
models:
  meta-llama/Llama-3.1-8B-Instruct: {policy: tidal, budget_tokens: 512, reselect_layer: 13}
  Qwen/*: {policy: quest}
  "*": {policy: streaming}
"""


@pytest.fixture
def policy_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "policies.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("spec", "sets", "told"),
    [
        ("qest", [], ["policy", "qest", "dense, streaming, quest, tidal", "'quest'", "sparseserve policies"]),
        (None, [], ["policy is missing", "dense, streaming, quest, tidal", "--policy NAME"]),
        ("quest", ["bugdet_tokens=5"], ["bugdet_tokens = 5", "sink_tokens", "'budget_tokens'", "rename"]),
        ("quest", ["budget_tokens=0"], ["--set", "budget_tokens = 0", "greater than or equal to 1"]),
        ("quest", ["budget_tokens=many"], ["budget_tokens = many", "integer", "--set budget_tokens="]),
        ("quest", ["budget_tokens=true"], ["budget_tokens = True", "integer"]),
        ("quest", ["unit_tokens=30"], ["unit_tokens = 30", "16, 32, 64", "'32'"]),
        ("quest", ["bound=minmax"], ["bound = minmax", "mean_std", "'min_max'"]),
        ("tidal", [*TIDAL, "scope=kvhead"], ["scope = kvhead", "all_heads, kv_head, query_head", "'kv_head'"]),
        ("moa", [], ["artifact is missing", "moa_alpha_beta.json", "--set artifact="]),
        ("quest", ["budget_tokens=64", "sink_tokens=32", "recent_tokens=40"], ["= 72", "budget_tokens = 64", "raise"]),
        ("streaming", ["recent_tokens=0"], ["recent_tokens = 0", "greater than or equal to 1"]),
        ("streaming", ["kv_memory=perhead"], ["kv_memory = perhead", "shared, per_head", "Did you mean 'per_head'"]),
        ("streaming", ["recall_sample=1"], ["recall_sample", "per_head", "give kv_memory=shared"]),
        ("retrieval", ["artifact=a", "compensate=true"], ["compensate", "per_head", "give kv_memory=shared"]),
        ("quest", ["budget_tokens"], ["--set = budget_tokens", "KEY=VALUE", "--set budget_tokens=512"]),
        ("quest", ["budget_tokens=[1"], ["budget_tokens = [1", "YAML"]),
        ("missing.yaml", [], ["missing.yaml", "dense, streaming, quest, tidal", "No such file"]),
    ],
)
def test_bad_input_is_explained(spec: str | None, sets: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_policy(spec, sets, {}, "model")
    assert [words for words in told if words not in str(error.value)] == []


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_policy("quest", ["budget_tokens=0", "bond=min_max"], {}, "model")
    assert "budget_tokens = 0" in str(error.value)
    assert "Did you mean 'bound'" in str(error.value)


def test_a_bad_name_is_told_before_the_model_is_known() -> None:
    with pytest.raises(ConfigError, match="dense_layer = 1"):
        find_policy("quest", ["dense_layer=1"], {})


def test_values_are_yaml_scalars() -> None:
    policy = load_policy("tidal", ["reselect-layer=13", "scope=all_heads", "budget_tokens=2_048"], {}, "model")
    assert policy == Tidal(reselect_layer=(13,), scope=Scope.ALL_HEADS, budget_tokens=2048)


def test_flags_win_over_environment_over_file(policy_file: Callable[[str], str]) -> None:
    env = {
        "SPARSESERVE_POLICY": policy_file("models: {'*': {policy: quest, budget_tokens: 1, sink_tokens: 1}}"),
        "SPARSESERVE_SET_BUDGET_TOKENS": "300",
        "SPARSESERVE_SET_SINK_TOKENS": "2",
    }
    expected = Quest(budget_tokens=400, sink_tokens=2)
    assert load_policy(None, ["budget_tokens=400"], env, "model") == expected
    assert load_policy("quest", ["budget_tokens=400"], env, "model") == expected


def test_the_environment_variable_at_fault_is_named() -> None:
    with pytest.raises(ConfigError, match="SPARSESERVE_SET_SINK: sink = 3 .*'sink_tokens'"):
        load_policy("quest", [], {"SPARSESERVE_SET_SINK": "3"}, "model")


@pytest.mark.parametrize(
    ("sets", "env", "where"),
    [
        (["policy=dense"], {}, "--set"),
        ([], {"SPARSESERVE_SET_POLICY": "dense"}, "SPARSESERVE_SET_POLICY"),
    ],
)
def test_a_hyper_parameter_does_not_change_the_policy(sets: list[str], env: dict[str, str], where: str) -> None:
    with pytest.raises(ConfigError, match=f"^{where}: policy = dense .* --policy dense, or SPARSESERVE_POLICY=dense"):
        find_policy("quest", sets, env)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", Tidal(budget_tokens=512, reselect_layer=(13,))),
        ("Qwen/Qwen2.5-7B", Quest()),
        ("mistralai/Mistral-7B", Streaming()),
    ],
)
def test_the_first_pattern_that_matches_wins(policy_file: Callable[[str], str], model: str, expected: object) -> None:
    assert load_policy(policy_file(FILE), [], {}, model) == expected


def test_a_local_model_matches_by_its_folder_too(policy_file: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "Llama-3-8B").mkdir()
    file = policy_file("models: {Llama-*: {policy: quest}}")
    assert load_policy(file, [], {}, str(tmp_path / "Llama-3-8B")) == Quest()
    with pytest.raises(ConfigError):
        load_policy(file, [], {}, "someone/Llama-3-8B")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models:\n  a: {policy: quest}\n  b: [\n", ["policies.yaml:4", "YAML"]),
        ("models:\n  a: {policy: quest}\n  a: {policy: dense}\n", ["policies.yaml:3", "a is written twice"]),
        ("model: {a: {policy: quest}}", ["policies.yaml", "models is missing"]),
        ("models: {Qwen/*: {policy: quest}}\nextra: 1", ["policies.yaml", "extra = 1", "models"]),
        ("models: {Qwen/*: quest}", ["policies.yaml", "models.Qwen/* = quest", "policy: quest"]),
        ("models: {Qwen/*: {budget_tokens: 5}}", ['policies.yaml, model "Qwen/*"', "policy is missing", "quest"]),
        ("models: {Qwen/*: {policy: qest}}", ['policies.yaml, model "Qwen/*"', "policy = qest", "'quest'"]),
        ("models: {Qwen/*: {policy: quest, budget: 9}}", ['model "Qwen/*"', "budget = 9", "'budget_tokens'"]),
        ("models: {Qwen/*: {policy: quest, budget_tokens: 0}}", ['model "Qwen/*"', "budget_tokens = 0"]),
        ("models: {Qwen/*: {policy: quest, sink_tokens: 2000}}", ['model "Qwen/*"', "sink_tokens + recent_tokens"]),
        ("models: {a: {policy: quest}, meta/*: {policy: dense}}", ["model = Qwen/Qwen3-8B", "a, meta/*", '"*"']),
        ("\0", ["policies.yaml", "YAML"]),
    ],
)
def test_errors_in_a_file_say_where(policy_file: Callable[[str], str], text: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_policy(policy_file(text), [], {}, "Qwen/Qwen3-8B")
    assert [words for words in told if words not in str(error.value)] == []


@pytest.mark.parametrize("name", POLICIES)
def test_policies_travel_as_json(name: str) -> None:
    required = [key for key, field in POLICIES[name].model_fields.items() if field.is_required()]
    policy = load_policy(name, [f"{key}=a-file" for key in required], {}, "model")
    assert from_dict(json.loads(json.dumps(to_dict(policy)))) == policy


def test_the_schema_accepts_and_refuses_what_we_do(policy_file: Callable[[str], str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    entries: list[dict[str, Any]] = [{"policy": "quest", "bound": "min_max"}, {"policy": "dense"}]
    entries += [{"policy": "tidal", "reselect_layer": layers} for layers in (4, [4, 9])]
    bad: list[dict[str, Any]] = [{"policy": "moa"}, {"policy": "quest", "budget_tokens": 0}]
    bad += [{"policy": "qest"}, {"bound": "min_max"}]
    for entry in entries:
        jsonschema.validate({"models": {"*": entry}}, policy_file_schema())
        from_dict(entry)
    for entry in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"models": {"*": entry}}, policy_file_schema())
        with pytest.raises(ConfigError):
            from_dict(entry)
