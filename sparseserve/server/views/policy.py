"""GET /v1/sparsity: the active policy and what requests may ask of it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, Field

from sparseserve.config import to_dict
from sparseserve.errors import ConfigError
from sparseserve.policies import Policy
from sparseserve.request_options import BUDGET, POLICY, aliases, read_options
from sparseserve.server.views.samples import Samples


class Choice(BaseModel):
    """Whether requests may choose something."""

    allowed: bool
    why_not: str | None = Field(description="what a request that asks for it is told; null where it is allowed")


class BudgetChoice(Choice):
    """Whether requests may have a budget of their own."""

    smallest_tokens: int | None = Field(description="fewest tokens a head attends to; null where it is not allowed")
    largest_tokens: int | None = Field(description="most tokens a head attends to; null where it is not allowed")


class RequestChoices(BaseModel):
    """What a request may ask for in `vllm_xargs`, or by an alias of the model."""

    per_request: bool = Field(description="whether requests may choose at all")
    dense: Choice = Field(description='dense attention: "sparse_policy": "dense"')
    budget: BudgetChoice = Field(description='a budget of its own: "sparse_budget_tokens": N')
    aliases: list[str] = Field(description="names of the model that stand for a choice; other budgets work as well")


class Recall(BaseModel):
    """How the quality of selections is watched."""

    sample: float = Field(description="share of decode steps in which recall is measured")
    floor: float | None = Field(description="softmax mass that a request's rows must keep; null without a floor")
    action: Literal["report", "widen", "dense"] = Field(description="what becomes of a request under the floor")
    remedy: str | None = Field(description="how to have recall measured; null where it is")


class ActivePolicy(BaseModel):
    """The policy of this server."""

    model: str = Field(description="the served name")
    policy: str = Field(description="the policy's name")
    description: str = Field(description="what the policy does, in a sentence")
    parameters: dict[str, Any] = Field(description="all hyper-parameters, as in a policy file")
    backend: str | None = Field(description="vLLM's attention backend; null before the workers told")
    runner: str | None = Field(description="vLLM's model runner, V1 or V2; null before the workers told")
    isa: str | None = Field(description="the instruction set that the kernels use; null before the workers told")
    version: str = Field(description="of sparseserve")
    self_check: Literal["passed", "failed", "unknown"] = Field(
        description="the kernels' check on real pages at start-up"
    )
    requests: RequestChoices
    recall: Recall


def active_policy(policy: Policy, model: str, registry: CollectorRegistry) -> ActivePolicy:
    """The policy of the model of that served name, and what the metrics in `registry` say of it."""
    samples = Samples(registry)
    info, check = samples.labels("info"), samples.total("self_check")
    parameters = to_dict(policy)
    return ActivePolicy(
        model=model,
        policy=parameters.pop("policy"),
        description=policy.description,
        parameters=parameters,
        backend=info.get("backend"),
        runner=info.get("runner"),
        isa=info.get("isa"),
        version=version("sparseserve"),
        self_check="unknown" if check is None else "passed" if check else "failed",
        requests=_requests(policy, model),
        recall=Recall(
            sample=policy.recall_sample,
            floor=policy.recall_floor,
            action=policy.recall_action,
            remedy=_remedy(policy),
        ),
    )


def _requests(policy: Policy, model: str) -> RequestChoices:
    budgets = policy.budgets
    budget = _refusal(policy, BUDGET, budgets.least if budgets else "N")
    smallest, largest = (budgets.least, budgets.largest) if budgets and budget is None else (None, None)
    dense = _refusal(policy, POLICY, "dense")
    return RequestChoices(
        per_request=policy.per_request,
        dense=Choice(allowed=dense is None, why_not=dense),
        budget=BudgetChoice(allowed=budget is None, why_not=budget, smallest_tokens=smallest, largest_tokens=largest),
        aliases=aliases(model, policy),
    )


def _refusal(policy: Policy, key: str, value: object) -> str | None:
    """What a request that asks for this is told; None when it gets it."""
    try:
        read_options({key: value}, policy)
    except ConfigError as error:
        return str(error)
    return None


def _remedy(policy: Policy) -> str | None:
    if policy.recall_sample:
        return None
    shared = " --set kv_memory=shared" if policy.frees_pages else ""
    return f"serve with --set recall_sample=0.01{shared}"
