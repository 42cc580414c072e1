"""What every policy is: hyper-parameters, a plan of the layers and a choice of tokens. No state, no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sparseserve.plan import ModelShape
from sparseserve.types import HeadShape, LayerPlan, PagedKV, Role, Scope, Step

Tokens = Annotated[int, Field(ge=0)]
PositiveTokens = Annotated[int, Field(ge=1)]


class Policy(BaseModel, ABC):
    """Chooses the tokens that each head of a decode step attends to."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str | None] = None

    min_tokens: Tokens = Field(1024, description="rows of at most this many tokens take vLLM's own attention")

    @property
    def head_scope(self) -> Scope:
        """Which heads share a selection."""
        return Scope.ALL_HEADS

    @property
    def selection_unit(self) -> int:
        """Tokens per unit of the selection."""
        return 32

    @property
    def selection_slots(self) -> int:
        """Most units that a selection can hold (S)."""
        return 0

    @property
    def dense_up_to(self) -> int:
        """Longest row, in tokens, for which the policy attends to everything anyway."""
        return self.min_tokens

    @abstractmethod
    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        """The plan of every layer; ConfigError when the model does not have the layers asked for."""

    @abstractmethod
    def expected_tokens(self, role: Role, length: int) -> int:
        """Tokens that a layer of `role` attends to in a row of `length` tokens, at most."""

    def summary_shape(self, heads: HeadShape, page_size: int) -> tuple[int, ...]:
        """Shape of one page's fp32 summary, () for none."""
        return ()

    def summary_bytes(self, heads: HeadShape, page_size: int) -> int:
        """Bytes that the policy wants in the tail of every page."""
        shape = self.summary_shape(heads, page_size)
        return 4 * prod(shape) if shape else 0

    def summarize(self, key: Tensor, slots: Tensor, summary: Tensor) -> None:
        """Fold keys [T, H, D] just written at `slots` [T] int64 into the page summaries [M, ...]."""

    def prepare(self, step: Step) -> None:
        """Write what every layer of the step shares, from the lengths alone."""

    def select(
        self, query: Tensor, kv: PagedKV, summary: Tensor | None, plan: LayerPlan, step: Step, scale: float
    ) -> None:
        """Write `step.selection` for `query` [B, Hq, D]; called on SELECT layers only."""
        raise AssertionError(f"{self.name} has no selection layers")


class BudgetPolicy(Policy):
    """A policy that keeps sink and recent tokens and fills a budget with the best-scored units."""

    budget_tokens: PositiveTokens = Field(1024, description="tokens a head attends to, sink and recent included")
    sink_tokens: Tokens = Field(0, description="first tokens, always attended to")
    recent_tokens: PositiveTokens = Field(1, description="last tokens, always attended to, the current one included")

    @model_validator(mode="after")
    def _fits(self) -> BudgetPolicy:
        if self.sink_tokens + self.recent_tokens > self.budget_tokens:
            raise ValueError(
                f"sink_tokens + recent_tokens = {self.sink_tokens + self.recent_tokens} exceed "
                f"budget_tokens = {self.budget_tokens}; raise the budget or keep fewer sink or recent tokens"
            )
        return self

    @property
    def selection_slots(self) -> int:
        return (self.budget_tokens - self.sink_tokens - self.recent_tokens) // self.selection_unit

    @property
    def dense_up_to(self) -> int:
        return max(self.min_tokens, self.budget_tokens)

    def expected_tokens(self, role: Role, length: int) -> int:
        return length if role is Role.DENSE else min(length, self.budget_tokens)

    def select_plan(self, layer: int, heads: HeadShape, dense_output: bool = False) -> LayerPlan:
        """The plan of a SELECT layer."""
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
