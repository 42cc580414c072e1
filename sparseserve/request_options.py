"""What a request may ask of the policy: `vllm_xargs` of the OpenAI API, or an alias of the model.

extra_body={"vllm_xargs": {"sparse_policy": "dense"}}    model="NAME@dense"
extra_body={"vllm_xargs": {"sparse_budget_tokens": 512}} model="NAME@budget-512"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparseserve.errors import ConfigError
from sparseserve.policies import Policy

POLICY, BUDGET = "sparse_policy", "sparse_budget_tokens"
CHOICES = ("default", "dense")
ALIAS, BUDGET_ALIAS = "@", "budget-"


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What one request asked for."""

    dense: bool = False
    budget_tokens: int | None = None  # None: the policy's


def read_options(xargs: Mapping[str, Any], policy: Policy) -> RequestOptions:
    """What our keys among a request's `vllm_xargs` ask of `policy`; ConfigError for what it cannot give."""
    given = {key: xargs[key] for key in (POLICY, BUDGET) if key in xargs}
    for key, value in given.items():
        if not policy.per_request:
            remedy = "drop the key; the server was started with per_request=false"
            raise ConfigError(key, value, "none: this server takes no choices from requests", remedy=remedy)
    dense = _dense(given[POLICY], policy) if POLICY in given else False
    budget = _budget(given[BUDGET], policy) if BUDGET in given else None
    if dense and budget is not None:
        raise ConfigError(BUDGET, budget, f"none with {POLICY} = dense", remedy=f"drop one of {POLICY} and {BUDGET}")
    return RequestOptions(dense, budget)


def read_alias(model: str, names: list[str]) -> tuple[str, dict[str, Any]]:
    """The served name and the `vllm_xargs` that a request's model stands for.

    A name that is served, and one that no served name begins, is as it is; ConfigError for an unknown ending.
    """
    name, at, ending = model.rpartition(ALIAS)
    if model in names or not at or name not in names:
        return model, {}
    if ending in CHOICES:
        return name, {POLICY: ending}
    tokens = ending.removeprefix(BUDGET_ALIAS)
    if ending.startswith(BUDGET_ALIAS) and tokens.isdecimal():
        return name, {BUDGET: int(tokens)}
    choices = [f"{name}{ALIAS}{choice}" for choice in (*CHOICES, f"{BUDGET_ALIAS}N")]
    raise ConfigError("model", model, choices=choices, remedy=f"write {name} for the server's policy")


def aliases(name: str, policy: Policy) -> list[str]:
    """The aliases of a served model to list: dense attention, and half to four times its budget, as far as allowed."""
    if not policy.per_request:
        return []
    bounds = policy.budgets
    budgets: list[int] = []
    if bounds is not None:
        tokens = bounds.default
        budgets = [
            size for size in (tokens // 2, tokens, 2 * tokens, 4 * tokens) if bounds.least <= size <= bounds.largest
        ]
    changed = policy.is_sparse and not policy.frees_pages  # by asking for dense attention
    endings = (["dense"] if changed else []) + [f"{BUDGET_ALIAS}{size}" for size in budgets]
    return [f"{name}{ALIAS}{ending}" for ending in endings]


def own_names(names: Iterable[str], policy: Policy) -> list[str]:
    """The served names without the aliases listed beside them."""
    names = list(names)
    listed = {alias for name in names for alias in aliases(name, policy)}
    return [name for name in names if name not in listed]


def _dense(value: object, policy: Policy) -> bool:
    if value not in CHOICES:
        raise ConfigError(POLICY, value, choices=CHOICES, remedy=f"drop {POLICY} for the server's policy")
    if value == "dense" and policy.frees_pages:
        remedy = "ask a server that was started with --set kv_memory=shared"
        raise ConfigError(POLICY, value, f"default: {policy.name} keeps no more than its windows here", remedy=remedy)
    return value == "dense"


def _budget(value: object, policy: Policy) -> int:
    bounds = policy.budgets
    if bounds is None:
        raise ConfigError(BUDGET, value, f"none: {policy.name} has no budget to change", remedy=f"drop {BUDGET}")
    if type(value) is not int or not bounds.least <= value <= bounds.largest:
        allowed = f"a whole number from {bounds.least} to {bounds.largest}, the server's max_budget_tokens"
        raise ConfigError(BUDGET, value, allowed, remedy=f"give {BUDGET} within these bounds, or drop it")
    return value
