"""How policies are served: which guards make sense together, and the remedy where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sparseserve.config import from_dict, to_dict
from sparseserve.errors import ConfigError
from sparseserve.policies import POLICIES, Policy
from tests.helpers.contract import CASES

SAMPLED = {"recall_sample": 0.5}
JUDGED = SAMPLED | {"recall_floor": 0.9}
BUDGETED = ["quest", "tidal", "seer"]  # requests may change it


def served(name: str, **options: Any) -> Policy:
    """A policy of that name, whose heads keep what a measurement needs."""
    policy = next(policy for policy in CASES.values() if policy.name == name)
    shared = {"kv_memory": "shared"} if "kv_memory" in POLICIES[name].model_fields else {}
    return from_dict(to_dict(policy) | shared | options)


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        served(name, **options)
    return str(error.value).removeprefix("additional_config.sparseserve: ")


@pytest.mark.parametrize("name", POLICIES)
def test_a_floor_needs_samples(name: str) -> None:
    told = "recall_floor judges what recall_sample measures, which is 0; give recall_sample=0.01."
    assert refusal(name, recall_floor=0.9) == told
    assert served(name, recall_floor=0.9, recall_sample=0.01).recall_action == "report"


@pytest.mark.parametrize("name", POLICIES)
def test_an_action_needs_a_floor(name: str) -> None:
    for action in ("widen", "dense"):
        told = f"recall_action = {action} needs a floor; give recall_floor=0.9."
        assert refusal(name, recall_action=action) == refusal(name, recall_action=action, **SAMPLED) == told
    assert served(name, recall_action="dense", **JUDGED).recall_floor == 0.9


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in BUDGETED])
def test_only_a_budget_can_be_widened(name: str) -> None:
    told = f"recall_action = widen: {name} has no budget to widen; give recall_action=dense."
    assert refusal(name, recall_action="widen", **JUDGED) == told


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_widened_though_requests_may_not_change_it(name: str) -> None:
    closed, widened = (served(name, per_request=False, **JUDGED, recall_action=act) for act in ("report", "widen"))
    assert closed.budgets is not None and closed.budgets.wider(None) is None
    assert widened.budgets is not None and widened.budgets.wider(None) == 2 * widened.budget


def test_a_threshold_takes_the_place_of_a_budget() -> None:
    told = "seer has no budget to widen; give recall_action=dense"
    assert told in refusal("seer", recall_action="widen", threshold=0.01, **JUDGED)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": "5"}, "min_tokens"),  # strict: files and flags give numbers
        ({"per_request": 1}, "per_request"),
        ({"recall_sample": -0.1}, "recall_sample"),
        ({"recall_sample": 1.1}, "recall_sample"),
        (SAMPLED | {"recall_floor": 0}, "recall_floor"),
        (SAMPLED | {"recall_floor": 1.1}, "recall_floor"),
        (JUDGED | {"recall_action": "stop"}, "recall_action"),
        ({"recall_samples": 0.5}, "recall_samples"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any], key: str) -> None:
    assert refusal("dense", **options).startswith(f"{key} = {options[key]} is refused.")


def test_the_bounds_themselves_are_allowed() -> None:
    policy = served("quest", min_tokens=0, recall_sample=1, recall_floor=1.0, per_request=False)
    assert (policy.min_tokens, policy.recall_sample, policy.recall_floor, policy.per_request) == (0, 1, 1, False)


def test_options_do_not_change_once_served() -> None:
    policy: Any = served("quest")
    with pytest.raises(ValidationError, match="frozen"):
        policy.min_tokens = 5


def test_nothing_is_watched_unasked() -> None:
    policy = from_dict({"policy": "quest"})
    assert (policy.recall_sample, policy.recall_floor, policy.recall_action) == (0, None, "report")
    assert policy.min_tokens == 1024 and policy.per_request
