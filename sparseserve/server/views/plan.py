"""GET /v1/sparsity/plan: what every layer and KV head reads at a length, from the configuration alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from sparseserve.model import ModelShape
from sparseserve.plugin.support.checks import plan_supported
from sparseserve.policies import Policy
from sparseserve.types import LayerPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class HeadPlan(BaseModel):
    """What the query heads of one KV head read."""

    reads: Literal["all", "window", "budget"] = Field(
        description="everything, first and last tokens that the length alone tells, or as many as a budget allows"
    )
    tokens: float = Field(description="tokens that a query head attends to, at most; the mean over its group")


class PlannedLayer(BaseModel):
    """One layer."""

    layer: int = Field(description="from 0")
    role: Literal["dense", "select", "reuse", "window"] = Field(description="what the layer does in a decode step")
    dense_output: bool = Field(description="whether it attends to everything, and chooses for the layers after it")
    tokens: float = Field(description="tokens that a head attends to, mean over heads")
    kv_heads: list[HeadPlan] = Field(description="in the model's order, of all tensor-parallel ranks")


class PlanView(BaseModel):
    """A row of `length` tokens in a decode step."""

    length: int = Field(description="tokens of the row")
    max_length: int = Field(description="the longest context that the server takes, in tokens")
    dense_up_to: int = Field(description="rows of at most this many tokens attend to everything")
    layers: list[PlannedLayer]
    tokens_read: float = Field(description="share of the row's KV tokens that a head attends to, mean over layers")
    bytes_read: float = Field(
        description="bytes read of the KV cache, what is read to choose included, against dense attention's 1"
    )
    bytes_stored: float = Field(description="bytes that the row holds in the KV cache, against dense attention's 1")


class Planner:
    """The plans of all tensor-parallel ranks of a served model."""

    def __init__(self, config: VllmConfig, policy: Policy) -> None:
        planned = plan_supported(config, policy)
        self._policy, self._planned = policy, planned
        self._kv_heads = config.model_config.get_total_num_kv_heads()
        self._memories = [planned.memory(rank) for rank in range(planned.model.ranks)]
        self.max_length = planned.model.max_len

    def plan(self, length: int) -> PlanView:
        """What a row of `length` tokens reads and stores."""
        layers = [self._layer(number, length) for number in range(self._planned.model.layers)]
        costs = [self._planned.step(length, rank) for rank in range(self._planned.model.ranks)]
        rows = [memory.row(length) for memory in self._memories]
        return PlanView(
            length=length,
            max_length=self.max_length,
            dense_up_to=self._policy.dense_up_to,
            layers=layers,
            tokens_read=sum(layer.tokens for layer in layers) / (length * len(layers)),
            bytes_read=sum(cost.bytes for cost in costs) / sum(cost.dense_bytes for cost in costs),
            bytes_stored=sum(row.bytes for row in rows) / sum(row.dense for row in rows),
        )

    def _layer(self, number: int, length: int) -> PlannedLayer:
        heads: dict[int, HeadPlan] = {}  # ranks may hold the same head
        for shape, plans in zip(self._planned.shapes, self._planned.plans, strict=True):
            first = shape.my_heads(self._kv_heads).start
            heads |= {first + i: head for i, head in enumerate(_heads(self._policy, plans[number], shape, length))}
        plan = self._planned.plans[0][number]
        return PlannedLayer(
            layer=number,
            role=plan.role.value,
            dense_output=plan.dense_output,
            tokens=sum(head.tokens for head in heads.values()) / len(heads),
            kv_heads=list(heads.values()),
        )


def _heads(policy: Policy, plan: LayerPlan, model: ModelShape, length: int) -> list[HeadPlan]:
    return [_head(policy, _of_head(plan, head, model.heads.kv_heads), length) for head in range(model.heads.kv_heads)]


def _head(policy: Policy, plan: LayerPlan, length: int) -> HeadPlan:
    tokens = length if length <= policy.dense_up_to else policy.expected_tokens(plan, length)
    if tokens >= length:
        return HeadPlan(reads="all", tokens=length)
    return HeadPlan(reads="budget" if plan.window is None else "window", tokens=tokens)


def _of_head(plan: LayerPlan, head: int, kv_heads: int) -> LayerPlan:
    """The plan with the windows and budgets of one KV head's selection heads alone."""

    def part(of_heads: Tensor) -> Tensor:
        size = of_heads.shape[0] // kv_heads  # 0 where all heads share one selection
        return of_heads[head * size : (head + 1) * size] if size else of_heads

    window = plan.window and replace(
        plan.window, sink=part(plan.window.sink), alpha=part(plan.window.alpha), beta=part(plan.window.beta)
    )
    return replace(plan, window=window, budget=None if plan.budget is None else part(plan.budget))
