"""How a policy is served, apart from what it is: from which length on, who may change it, and how it is watched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Tokens = Annotated[int, Field(ge=0)]
PositiveTokens = Annotated[int, Field(ge=1)]


class ServingOptions(BaseModel):
    """What every policy may be told beside its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    min_tokens: Tokens = Field(1024, description="rows of at most this many tokens take vLLM's own attention")
    per_request: bool = Field(
        True, description="requests may ask for dense attention or a budget of their own (vllm_xargs, model aliases)"
    )
    recall_sample: Annotated[float, Field(ge=0, le=1)] = Field(
        0,
        description="share of decode steps that also attend to everything, in a quarter of the layers, to measure the "
        "softmax mass that rows keep; 1 measures every layer of every step",
    )
    recall_floor: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="softmax mass that a request's rows must keep; needs recall_sample"
    )
    recall_action: Literal["report", "widen", "dense"] = Field(
        "report",
        description="what becomes of a request that stays under the floor: counted, its budget doubled up to "
        "max_budget_tokens and then dense, or dense at once",
    )
