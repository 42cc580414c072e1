"""Policies whose heads attend to the first and the last tokens, as the length alone tells."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from sparseserve.model import ModelShape
from sparseserve.policies.base import Policy
from sparseserve.types import LayerPlan


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
