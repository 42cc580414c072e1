"""What every policy is: hyper-parameters, a plan of the layers and a choice of tokens. No state, no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sparseserve import artifacts
from sparseserve.artifacts import Artifact, Kind
from sparseserve.errors import ArtifactError, ConfigError, Problem
from sparseserve.model import ModelShape
from sparseserve.types import HeadShape, LayerPlan, NewTokens, PagedKV, Role, Scope, Step, Wanted

Tokens = Annotated[int, Field(ge=0)]
PositiveTokens = Annotated[int, Field(ge=1)]


class Policy(BaseModel, ABC):
    """Chooses the tokens that each head of a decode step attends to."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    description: ClassVar[str]
    papers: ClassVar[dict[str, str]] = {}  # address by title, the paper that it follows first
    is_sparse: ClassVar[bool] = True  # whether it leaves tokens out
    for_any_model: ClassVar[bool] = True  # whether models need not be trained or measured for it
    finds_single_tokens: ClassVar[bool] = True  # whether tokens that stand alone are found wherever they are
    page_state_dtype: ClassVar[torch.dtype | None] = None  # of the page summaries; the cache's without

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

    @model_validator(mode="after")
    def _guards(self) -> Policy:
        if self.recall_floor is not None and not self.recall_sample:
            raise ValueError("recall_floor judges what recall_sample measures, which is 0; give recall_sample=0.01")
        if self.recall_action != "report" and self.recall_floor is None:
            raise ValueError(f"recall_action = {self.recall_action} needs a floor; give recall_floor=0.9")
        if self.recall_action == "widen" and self.budget_bounds is None:
            raise ValueError(f"recall_action = widen: {self.name} has no budget to widen; give recall_action=dense")
        return self

    @classmethod
    def has_defaults(cls) -> bool:
        """Whether it can do without any setting, such as an artifact."""
        return not any(field.is_required() for field in cls.model_fields.values())

    @property
    def budget(self) -> int:
        """Tokens that a head attends to by its settings; 0 where they do not say so."""
        return 0

    def at_budget(self, tokens: int) -> dict[str, int]:
        """The settings that make `tokens` the budget; none for a policy without one."""
        return {}

    @property
    def head_scope(self) -> Scope:
        """Which heads share a selection."""
        return Scope.ALL_HEADS

    @property
    def selection_unit(self) -> int:
        """Tokens per unit of the selection."""
        return 32

    def selection_slots(self, max_len: int) -> int:
        """Most units that a selection can hold (S), in rows of up to `max_len` tokens."""
        return 0

    def scored_units(self, max_len: int) -> int:
        """Most units that are scored at a time in rows of up to `max_len` tokens."""
        return 0

    @property
    def dense_up_to(self) -> int:
        """Longest row, in tokens, for which the policy attends to everything anyway."""
        return self.min_tokens

    @property
    def budget_bounds(self) -> tuple[int, int] | None:
        """Fewest and most tokens that a request may have as its budget; None without a budget that can change."""
        return None

    def wider(self, budget: int) -> int:
        """The next larger budget of a request that has `budget` tokens (0: the policy's); 0 without one."""
        return 0

    def dense_rows_up_to(self, budget: int) -> int:
        """`dense_up_to` of a row with a budget of its own."""
        return self.dense_up_to

    @property
    def frees_pages(self) -> bool:
        """Whether heads store no more than they may attend to, in their prompt, too."""
        return False

    @property
    def host_bound(self) -> str:
        """The switch that makes a step wait for values on the host, so that CUDA cannot run it; "" for none."""
        return ""

    @abstractmethod
    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        """The plan of every layer; ConfigError when the model does not have the layers asked for."""

    def expected_tokens(self, plan: LayerPlan, length: int) -> float:
        """Tokens that a layer attends to in a row of `length` tokens, at most; the mean over its heads."""
        if plan.window is None or length <= self.dense_up_to:
            return length
        first, start = plan.window.at(length)
        return float((length - (start - first).clamp(min=0)).double().mean())

    def page_state_shape(self, heads: HeadShape, page_size: int) -> tuple[int, ...]:
        """Shape of one page's summary, () for none."""
        return ()

    def page_state_bytes(self, heads: HeadShape, page_size: int, element_bytes: int) -> int:
        """Bytes that the policy wants in the tail of every page; `element_bytes` is the size of a cached number."""
        shape = self.page_state_shape(heads, page_size)
        size = element_bytes if self.page_state_dtype is None else self.page_state_dtype.itemsize
        return size * prod(shape) if shape else 0

    def update_pages(self, new: NewTokens, kv: PagedKV, summary: Tensor, plan: LayerPlan) -> None:
        """Bring the page summaries [M, ...] of a layer up to date with tokens just written to its `kv`."""

    def scored_bytes(self, plan: LayerPlan, model: ModelShape, length: int, element_bytes: int) -> float:
        """Bytes that a layer reads in a step beside the tokens it attends to, for a row of `length` tokens.

        The summaries of the whole row for layers that select. `element_bytes` is the size of a cached number.
        """
        if plan.role is not Role.SELECT:
            return 0
        return -(-length // model.page_size) * self.page_state_bytes(model.heads, model.page_size, element_bytes)

    def prepare(self, step: Step, model: ModelShape) -> None:
        """Write the units that WINDOW layers share, from the lengths alone."""

    def select(
        self, query: Tensor, kv: PagedKV, summary: Tensor | None, plan: LayerPlan, step: Step, scale: float
    ) -> None:
        """Write `step.selection` for `query` [B, Hq, D]; called on SELECT layers only."""
        raise AssertionError(f"{self.name} has no selection layers")

    def after_attend(
        self, query: Tensor, kv: PagedKV, summary: Tensor | None, plan: LayerPlan, step: Step, scale: float, out: Tensor
    ) -> None:
        """Change `out` [B, Hq, D], with its log-sum-exp in `step.lse`, once a layer has attended."""


class WindowPolicy(Policy):
    """A policy whose heads attend to the first and the last tokens, as the length alone tells."""

    kv_memory: Literal["shared", "per_head"] = Field(
        "per_head",
        description="per_head: heads free what leaves their windows, which hold in the prompt, too; shared: all heads "
        "keep everything, and attend to it in the prompt",
    )

    @property
    def frees_pages(self) -> bool:
        return self.kv_memory == "per_head"

    @abstractmethod
    def window_plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        """The plan of every layer, without regard to what its heads store."""

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        """Heads that store whole pages, and would never free one, attend to all that they store."""
        plans = self.window_plans(model)
        if not self.frees_pages:
            return plans
        windows = [plan.window and plan.window.in_pages(model.page_size, model.max_len) for plan in plans]
        return tuple(replace(plan, window=window) for plan, window in zip(plans, windows, strict=True))

    @model_validator(mode="after")
    def _keeps_what_it_needs(self) -> WindowPolicy:
        if self.frees_pages and self.recall_sample:
            raise ValueError("recall_sample attends to tokens that kv_memory = per_head frees; give kv_memory=shared")
        return self


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
    def budget_bounds(self) -> tuple[int, int] | None:
        return self.least_budget, self.largest_budget

    def wider(self, budget: int) -> int:
        now = budget or self.budget_tokens
        return min(2 * now, self.largest_budget) if now < self.largest_budget else 0

    def dense_rows_up_to(self, budget: int) -> int:
        return max(self.min_tokens, budget) if budget else self.dense_up_to

    def selection_slots(self, max_len: int) -> int:
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


def load_artifact(source: str, kind: Kind) -> Artifact:
    """The artifact, which must be of the kind that a policy reads."""
    artifact = artifacts.load(source)
    if artifact.kind != kind:
        allowed = f"an artifact of the kind {kind}"
        raise ArtifactError(Problem("artifact", source, allowed, remedy=f"serve it with --policy {artifact.kind}"))
    return artifact
