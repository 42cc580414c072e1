"""What a request may ask of a policy, and the words in which the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sparseserve.config import from_dict
from sparseserve.errors import ConfigError
from sparseserve.policies import Policy
from sparseserve.request_options import RequestOptions, aliases, own_names, read_alias, read_options

POLICY, BUDGET = "sparse_policy", "sparse_budget_tokens"


def policy(name: str, **settings: Any) -> Policy:
    return from_dict({"policy": name, **settings})


QUEST = policy("quest", budget_tokens=512)  # 112 to 2048: sink, recent tokens and a unit at least
CLOSED = policy("quest", per_request=False)
FREEING, SHARED = policy("streaming"), policy("streaming", kv_memory="shared")
HIP, DENSE = policy("hip"), policy("dense")
THRESHOLD = policy("seer", artifact="gates", threshold=0.01)


@pytest.mark.parametrize(
    ("asked", "xargs", "expected"),
    [
        (QUEST, {}, RequestOptions()),
        (QUEST, {"session_id": "s", "sparse": 1}, RequestOptions()),  # keys of others
        (QUEST, {POLICY: "default"}, RequestOptions()),
        (QUEST, {POLICY: "dense"}, RequestOptions(dense=True)),
        (QUEST, {BUDGET: 112}, RequestOptions(budget_tokens=112)),
        (QUEST, {BUDGET: 2048, POLICY: "default"}, RequestOptions(budget_tokens=2048)),
        (CLOSED, {"session_id": "s"}, RequestOptions()),
        (FREEING, {POLICY: "default"}, RequestOptions()),
        *((other, {POLICY: "dense"}, RequestOptions(dense=True)) for other in (SHARED, HIP, DENSE, THRESHOLD)),
    ],
)
def test_what_a_policy_can_give_is_had(asked: Policy, xargs: dict[str, Any], expected: RequestOptions) -> None:
    assert read_options(xargs, asked) == expected


BOUNDS = "a whole number from 112 to 2048, the server's max_budget_tokens"
WITHIN = f"give {BUDGET} within these bounds, or drop it"
CLOSED_TO = "none: this server takes no choices from requests"
OPENED = "drop the key; the server was started with per_request=false"
NO_MORE = "default: streaming keeps no more than its windows here"
MORE = "ask a server that was started with --set kv_memory=shared"
ONE_OF = f"drop one of {POLICY} and {BUDGET}"


@pytest.mark.parametrize(
    ("asked", "xargs", "key", "allowed", "remedy"),
    [
        *((QUEST, {BUDGET: wrong}, BUDGET, BOUNDS, WITHIN) for wrong in (111, 2049, 512.0, True, None, "512", [512])),
        *(
            (other, {BUDGET: 512}, BUDGET, f"none: {other.name} has no budget to change", f"drop {BUDGET}")
            for other in (HIP, THRESHOLD, DENSE, SHARED, FREEING)
        ),
        (FREEING, {POLICY: "dense"}, POLICY, NO_MORE, MORE),
        (QUEST, {POLICY: "dense", BUDGET: 512}, BUDGET, f"none with {POLICY} = dense", ONE_OF),
        *((CLOSED, {key: value}, key, CLOSED_TO, OPENED) for key, value in [(POLICY, "default"), (BUDGET, 1024)]),
    ],
)
def test_what_it_cannot_is_refused_with_the_remedy(
    asked: Policy, xargs: dict[str, Any], key: str, allowed: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read_options(xargs, asked)
    problem = error.value.problem
    assert (problem.key, problem.value, problem.allowed, problem.remedy) == (key, xargs[key], allowed, remedy)


@pytest.mark.parametrize("value", ["Dense", "quest", "", None, True, ["dense"]])
def test_another_policy_cannot_be_asked_for(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        read_options({POLICY: value}, QUEST)
    problem = error.value.problem
    assert (problem.key, problem.value, tuple(problem.choices)) == (POLICY, value, ("default", "dense"))
    assert problem.remedy == "drop sparse_policy for the server's policy"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("m", ("m", {})),
        ("m@default", ("m", {POLICY: "default"})),
        ("m@dense", ("m", {POLICY: "dense"})),
        ("m@budget-007", ("m", {BUDGET: 7})),
        ("a@home", ("a@home", {})),  # a name, though it looks like an alias
        ("a@home@dense", ("a@home", {POLICY: "dense"})),
        ("m@home", ("m@home", {})),  # and begins like a name
        ("other@dense", ("other@dense", {})),  # of no model here
        ("@dense", ("@dense", {})),
        ("", ("", {})),
    ],
)
def test_an_alias_is_a_name_and_a_choice(model: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert read_alias(model, ["m", "a@home", "m@home"]) == expected


@pytest.mark.parametrize(
    "ending", ["", "Dense", "budget-", "budget--1", "budget-1.5", "budget-1e3", "budget-\u00b2", "512"]
)
def test_an_unknown_ending_is_refused_with_the_endings(ending: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_alias(f"m@{ending}", ["m"])
    problem = error.value.problem
    assert (problem.key, problem.value) == ("model", f"m@{ending}")
    assert problem.choices == ["m@default", "m@dense", "m@budget-N"]
    assert problem.remedy == "write m for the server's policy"


@pytest.mark.parametrize(
    ("asked", "endings"),
    [
        (QUEST, ["dense", "budget-256", "budget-512", "budget-1024", "budget-2048"]),
        (
            policy("quest", budget_tokens=512, max_budget_tokens=1500),
            ["dense", "budget-256", "budget-512", "budget-1024"],
        ),
        (policy("quest", budget_tokens=128), ["dense", "budget-128", "budget-256", "budget-512"]),  # 64 holds no unit
        (SHARED, ["dense"]),
        (HIP, ["dense"]),
        (THRESHOLD, ["dense"]),
        *((other, []) for other in (CLOSED, FREEING)),
    ],
)
def test_listed_are_the_choices_that_change_something_and_can_be_had(asked: Policy, endings: list[str]) -> None:
    assert aliases("m", asked) == [f"m@{ending}" for ending in endings]
    for alias in aliases("m", asked):
        name, xargs = read_alias(alias, ["m"])
        assert name == "m" and read_options(xargs, asked) == RequestOptions("@dense" in alias, xargs.get(BUDGET))


def test_own_names_are_those_that_are_no_alias_of_another() -> None:
    names = ["b", "m", "m@dense", "m@budget-1024", "m@budget-300", "m@home", "x@dense"]
    kept = ["b", "m", "m@budget-300", "m@home", "x@dense"]  # 300 tokens are not listed, and x is not served
    assert own_names(iter(names), QUEST) == kept
    assert own_names(names, CLOSED) == names and own_names([], QUEST) == []
