"""Policies that keep sink and recent tokens, and fill a budget with the units that score best."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparseserve.errors import ConfigError
from sparseserve.policies.base import Policy
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.types import Budgets, HeadShape, LayerPlan, Role, Step, Wanted


class BudgetPolicy(Policy):
    """A policy that keeps sink and recent tokens and fills a budget with the best-scored units."""

    budget_tokens: PositiveTokens = Field(1024, description="tokens a head attends to, sink and recent included")
    sink_tokens: Tokens = Field(0, description="first tokens, always attended to")
    recent_tokens: PositiveTokens = Field(1, description="last tokens, always attended to, the current one included")
    max_budget_tokens: PositiveTokens | None = Field(
        None, description="largest budget that a request may have; four times budget_tokens without"
    )

    @model_validator(mode="after")
    def _fits(self) -> BudgetPolicy:
        if self.sink_tokens + self.recent_tokens > self.budget_tokens:
            raise ValueError(
                f"sink_tokens + recent_tokens = {self.sink_tokens + self.recent_tokens} exceed "
                f"budget_tokens = {self.budget_tokens}; raise the budget or keep fewer sink or recent tokens"
            )
        if self.max_budget_tokens is not None and self.max_budget_tokens < self.budget_tokens:
            raise ValueError(
                f"max_budget_tokens = {self.max_budget_tokens} is less than budget_tokens = {self.budget_tokens}; "
                "raise it, or drop it"
            )
        return self

    @property
    def budget(self) -> int:
        return self.budget_tokens

    def at_budget(self, tokens: int) -> dict[str, int]:
        return {"budget_tokens": tokens}

    @property
    def least_budget(self) -> int:
        """A unit in tokens, beside sink and recent tokens."""
        return self.sink_tokens + self.recent_tokens + self.selection_unit

    @property
    def largest_budget(self) -> int:
        """The most tokens that any request may have as its budget."""
        if not self.per_request and self.recall_action != "widen":
            return self.budget_tokens
        return 4 * self.budget_tokens if self.max_budget_tokens is None else self.max_budget_tokens

    @property
    def budgets(self) -> Budgets | None:
        return Budgets(self.budget_tokens, self.least_budget, self.largest_budget)

    def selection_units(self, max_len: int) -> int:
        largest = min(self.largest_budget, max(max_len, self.budget_tokens))
        return (largest - self.sink_tokens - self.recent_tokens) // self.selection_unit

    @property
    def dense_up_to(self) -> int:
        return max(self.min_tokens, self.budget_tokens)

    def expected_tokens(self, plan: LayerPlan, length: int) -> float:
        return length if plan.dense_output else min(length, self.budget_tokens)

    def check_budget(self) -> None:
        """Raise ConfigError for a budget that holds no unit."""
        if self.budget_tokens < self.least_budget:
            allowed = (
                f"at least {self.least_budget}: a unit of {self.selection_unit} tokens beside sink and recent tokens"
            )
            raise ConfigError("budget_tokens", self.budget_tokens, allowed, remedy="give --set budget_tokens=2048")

    def select_plan(self, layer: int, heads: HeadShape, dense_output: bool = False) -> LayerPlan:
        """The plan of a SELECT layer; ConfigError for a budget that holds no unit."""
        self.check_budget()
        hs = heads.selection_heads(self.head_scope)

        def full(tokens: int) -> Tensor:
            return torch.full((hs,), tokens, dtype=torch.int32)

        return LayerPlan(
            layer,
            Role.SELECT,
            dense_output,
            sink=full(self.sink_tokens),
            recent=full(self.recent_tokens),
            budget=full(self.budget_tokens),
        )

    def wanted(self, plan: LayerPlan, step: Step, threshold: float | None = None) -> Wanted:
        """What `step.selection` is to hold: the best units within the plan's budget, or all above a threshold."""
        assert plan.sink is not None and plan.recent is not None and plan.budget is not None
        return Wanted(step.selection, plan.sink, plan.recent, plan.budget, threshold, step.row_budget)


class ScorePolicy(BudgetPolicy):
    """A budget policy that scores every unit of a row."""

    def scored_units(self, max_len: int) -> int:
        return -(-max_len // self.selection_unit)
