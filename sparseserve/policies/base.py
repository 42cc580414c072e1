"""What every policy is: hyper-parameters, a plan of the layers and a choice of tokens. No state, no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import model_validator
from torch import Tensor

from sparseserve.model import ModelShape
from sparseserve.policies.serving import ServingOptions
from sparseserve.types import Budgets, HeadShape, LayerPlan, NewTokens, PagedKV, PageState, Role, Scope, Step


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """A layer's policy and plan, its cache and what the policy keeps of its pages, bound once the cache exists."""

    policy: Policy
    plan: LayerPlan
    kv: PagedKV
    page_state: Tensor | None  # [M, ...], in the tails of the pages
    scale: float

    @property
    def state(self) -> Tensor:
        """The page state of a policy that keeps one."""
        assert self.page_state is not None
        return self.page_state


class Policy(ServingOptions, ABC):
    """Chooses the tokens that each head of a decode step attends to."""

    name: ClassVar[str]
    description: ClassVar[str]
    papers: ClassVar[dict[str, str]] = {}  # address by title, the paper that it follows first
    is_sparse: ClassVar[bool] = True  # whether it leaves tokens out
    for_any_model: ClassVar[bool] = True  # whether models need not be trained or measured for it
    finds_single_tokens: ClassVar[bool] = True  # whether tokens that stand alone are found wherever they are

    @model_validator(mode="after")
    def _guards(self) -> Policy:
        if self.recall_floor is not None and not self.recall_sample:
            raise ValueError("recall_floor judges what recall_sample measures, which is 0; give recall_sample=0.01")
        if self.recall_action != "report" and self.recall_floor is None:
            raise ValueError(f"recall_action = {self.recall_action} needs a floor; give recall_floor=0.9")
        if self.recall_action == "widen" and self.budgets is None:
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

    def selection_units(self, max_len: int) -> int:
        """Most units that a selection can hold (K), in rows of up to `max_len` tokens."""
        return 0

    def scored_units(self, max_len: int) -> int:
        """Most units that are scored at a time in rows of up to `max_len` tokens."""
        return 0

    @property
    def dense_up_to(self) -> int:
        """Longest row, in tokens, for which the policy attends to everything anyway."""
        return self.min_tokens

    @property
    def budgets(self) -> Budgets | None:
        """The budgets that requests may have; None without a budget that can change."""
        return None

    def row_dense_up_to(self, budget_tokens: int | None) -> int:
        """`dense_up_to` of a row with a budget of its own, or None."""
        return self.dense_up_to if budget_tokens is None else max(self.min_tokens, budget_tokens)

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

    def page_state(self, heads: HeadShape, page_size: int) -> PageState | None:
        """What the policy keeps of a page; None for nothing."""
        return None

    def page_state_bytes(self, heads: HeadShape, page_size: int, element_bytes: int) -> int:
        """Bytes that the policy wants in the tail of every page; `element_bytes` is the size of a cached number."""
        state = self.page_state(heads, page_size)
        return 0 if state is None else state.bytes(element_bytes)

    def update_pages(self, layer: SparseLayer, new: NewTokens) -> None:
        """Bring the state [M, ...] of a layer's pages up to date with tokens just written to its cache."""

    def scored_bytes(self, plan: LayerPlan, model: ModelShape, length: int, element_bytes: int) -> float:
        """Bytes that a layer reads in a step beside the tokens it attends to, for a row of `length` tokens.

        The page state of the whole row for layers that select. `element_bytes` is the size of a cached number.
        """
        if plan.role is not Role.SELECT:
            return 0
        return -(-length // model.page_size) * self.page_state_bytes(model.heads, model.page_size, element_bytes)

    def prepare(self, step: Step, model: ModelShape) -> None:
        """Write the units that WINDOW layers share, from the lengths alone."""

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        """Write `step.selection` for `query` [B, Hq, D]; called on SELECT layers only."""
        raise AssertionError(f"{self.name} has no selection layers")

    def after_attend(self, layer: SparseLayer, query: Tensor, step: Step, out: Tensor) -> None:
        """Change `out` [B, Hq, D], with its log-sum-exp in `step.lse`, once a layer has attended."""
