"""Staged search for the best blocks, refreshed now and then (HiP, arXiv 2406.09827; InfiniteHiP, arXiv 2502.08910)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from sparseserve import ops
from sparseserve.model import ModelShape
from sparseserve.policies.base import SparseLayer
from sparseserve.policies.budget import BudgetPolicy
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.types import Budgets, HeadShape, LayerPlan, NewTokens, PageState, Scope, Step

Steps = Annotated[int, Field(ge=1)]
_COUNTERS = 4  # words of a page's state before the lists of chunks
_LINE = 16  # words of a cache line


def _tuple(value: object) -> object:
    # strict models take tuples only; files and flags give lists
    return tuple(value) if isinstance(value, list) else value


class Hip(BudgetPolicy):
    """Searches each row for its best chunks in three stages, reading a few keys of each chunk, and keeps what it found.

    The rules are InfiniteHiP's without its context extension: tokens keep their positions. Upstream calls its first
    layers dense, but they too select, with a larger budget: `wide_layers`. Heads that share a selection take the
    largest score among them; `all_heads`, upstream's default, means all heads of a rank.

    What differs: scores stay fp32, where upstream rounds them to the query's dtype; a search covers the row, not a
    configured maximum; and what a search found lies in the last page of its row, where upstream has one counter of
    steps for the whole batch. A new page therefore begins with a full search: with pages of fewer tokens than
    `refresh_steps`, which are counted from the start of the page, searches are more frequent.
    """

    name: ClassVar[str] = "hip"
    description: ClassVar[str] = "The blocks that a search in three stages finds by a few keys; most steps reuse them."
    papers: ClassVar[dict[str, str]] = {
        "InfiniteHiP": "https://arxiv.org/abs/2502.08910",
        "HiP": "https://arxiv.org/abs/2406.09827",
    }
    finds_single_tokens: ClassVar[bool] = False

    budget_tokens: PositiveTokens = Field(3328, description="tokens a head attends to, sink and recent included")
    sink_tokens: Tokens = Field(256, description="first tokens, always attended to; a multiple of the last chunk")
    recent_tokens: PositiveTokens = Field(1024, description="last tokens, always attended to, the current one included")
    wide_layers: Annotated[int, Field(ge=0)] = Field(4, description="first layers, which have a budget of their own")
    wide_budget_tokens: PositiveTokens = Field(5376, description="budget_tokens of the wide layers")
    chunk_tokens: Annotated[tuple[PositiveTokens, PositiveTokens, PositiveTokens], BeforeValidator(_tuple)] = Field(
        (256, 32, 8), description="tokens per chunk in each stage, powers of two; the last are the units"
    )
    stage_tokens: Annotated[tuple[PositiveTokens, PositiveTokens], BeforeValidator(_tuple)] = Field(
        (32768, 8192), description="tokens that enter the second and the third stage"
    )
    refresh_steps: Annotated[tuple[Steps, Steps, Steps], BeforeValidator(_tuple)] = Field(
        (32, 16, 8), description="steps between searches from the first, the second and the third stage on"
    )
    scope: Literal["all_heads", "kv_head"] = Field("all_heads", description="heads that share a selection")

    @model_validator(mode="after")
    def _searchable(self) -> Hip:
        chunks, stages = self.chunk_tokens, self.stage_tokens
        if any(chunk & (chunk - 1) for chunk in chunks) or any(a <= b for a, b in pairwise(chunks)) or chunks[-1] > 32:
            raise ValueError(
                f"chunk_tokens = {list(chunks)} must be powers of two that descend to at most 32; "
                "give for example [256, 32, 8]"
            )
        if any(stage % chunk for stage, chunk in zip(stages, chunks, strict=False)):
            raise ValueError(f"stage_tokens = {list(stages)} must be multiples of chunk_tokens = {list(chunks[:2])}")
        if self.sink_tokens % chunks[-1]:
            raise ValueError(f"sink_tokens = {self.sink_tokens} must be a multiple of {chunks[-1]}, the last chunk")
        if self.wide_layers and self.wide_budget_tokens < self.budget_tokens:
            raise ValueError(
                f"wide_budget_tokens = {self.wide_budget_tokens} must be at least budget_tokens = "
                f"{self.budget_tokens}; raise it, or give wide_layers=0"
            )
        if not stages[0] >= stages[1] >= self._searched_tokens:
            raise ValueError(
                f"stage_tokens = {list(stages)} must descend, to at least the {self._searched_tokens} tokens that the "
                "largest budget leaves beside sink and recent tokens; raise stage_tokens or lower the budgets"
            )
        return self

    @property
    def _searched_tokens(self) -> int:
        """The most tokens that a search keeps."""
        budget = self.wide_budget_tokens if self.wide_layers else self.budget_tokens
        return budget - self.sink_tokens - self.recent_tokens

    @property
    def budgets(self) -> Budgets | None:
        return None  # what a search found lies in the row's last page, in room of one size

    @property
    def head_scope(self) -> Scope:
        return Scope(self.scope)

    @property
    def selection_unit(self) -> int:
        return self.chunk_tokens[-1]

    def selection_units(self, max_len: int) -> int:
        return self._searched_tokens // self.selection_unit

    def scored_units(self, max_len: int) -> int:
        return ops.most_chunks(max_len, self.chunk_tokens, self.stage_tokens)

    def expected_tokens(self, plan: LayerPlan, length: int) -> float:
        assert plan.budget is not None
        return min(length, float(plan.budget.double().mean()))

    def scored_bytes(self, plan: LayerPlan, model: ModelShape, length: int, element_bytes: int) -> float:
        """The state in the last page and the keys that a step probes, the mean over the steps from search to search."""
        attended = self.expected_tokens(plan, length)
        if attended == length:
            return 0.0  # attended to without a search
        key = model.heads.kv_heads * model.heads.head_dim * element_bytes
        tokens = max(0.0, length - self.sink_tokens - max(0, self.recent_tokens - self.chunk_tokens[0]))
        found = attended - self.sink_tokens - self.recent_tokens
        keys, period = 0.0, model.page_size  # a page begins with a search
        for chunk, most, steps in zip(self.chunk_tokens, (*self.stage_tokens, found), self.refresh_steps, strict=True):
            period = min(period, steps)
            probes = 2 * chunk.bit_length()  # two in each round, from the width of the chunk down to 1
            if tokens > most:  # else all are kept unseen
                keys += tokens / chunk * probes / period
                tokens = most
        return keys * key + self.page_state_bytes(model.heads, model.page_size, element_bytes)

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        model.check_first_layers("wide_layers", self.wide_layers, default=0)
        return tuple(self._plan(layer, model.heads) for layer in range(model.layers))

    def _plan(self, layer: int, heads: HeadShape) -> LayerPlan:
        plan = self.select_plan(layer, heads)
        if layer >= self.wide_layers:
            return plan
        assert plan.budget is not None
        return replace(plan, budget=torch.full_like(plan.budget, self.wide_budget_tokens))

    def page_state(self, heads: HeadShape, page_size: int) -> PageState | None:
        kept = sum(tokens // chunk for tokens, chunk in zip(self.stage_tokens, self.chunk_tokens, strict=False))
        words = _COUNTERS + kept + self.selection_units(0)
        return PageState((heads.selection_heads(self.head_scope), -(-words // _LINE) * _LINE), torch.int32)

    def update_pages(self, layer: SparseLayer, new: NewTokens) -> None:
        """Forget what the pages that begin remember of the rows that had them before."""
        size, state = layer.kv.page_size, layer.state
        kept = (new.slot_mapping % size).clamp(max=1).int()  # 0 for the first token of a page, 1 for padding
        pages = new.slot_mapping.clamp(min=0) // size
        heads = state.shape[1]
        # A product has no order among the tokens of a page, and its shapes do not depend on how many pages begin.
        state[:, :, 0].scatter_reduce_(0, pages[:, None].expand(-1, heads), kept[:, None].expand(-1, heads), "prod")

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        ops.search_blocks(
            query,
            layer.kv.key,
            step.table,
            layer.state,
            chunk_tokens=self.chunk_tokens,
            stage_tokens=self.stage_tokens,
            refresh_steps=self.refresh_steps,
            wanted=self.wanted(layer.plan, step),
            scores=step.scores,
            scratch=step.scratch,
        )
