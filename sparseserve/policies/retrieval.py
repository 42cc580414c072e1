"""Retrieval heads read everything, the others the first and the most recent tokens.

Head maps: Retrieval Heads (arXiv 2404.15574), DuoAttention (arXiv 2410.10819), RazorAttention (arXiv 2407.15891).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparseserve.artifacts import Artifact
from sparseserve.model import ModelShape
from sparseserve.policies.artifact import load_artifact
from sparseserve.policies.base import SparseLayer
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.policies.window import WindowPolicy
from sparseserve.types import HeadShape, LayerPlan, NewTokens, PageState, Role, Scope, Step, Window

SINK_TOKENS, RECENT_TOKENS = 64, 1024  # where neither the artifact nor the user says


class Retrieval(WindowPolicy):
    """A KV head is a retrieval head by its score, the largest of its query heads' where the artifact scores those.

    `threshold` takes the scores from it on, `share` the best round(share * heads) KV heads of the whole model: the
    same as DuoAttention's quantile `sparsity` = 1 - share. Ties go to the lower layer, then to the lower head.
    An artifact's recent tokens are those before the current one, as DuoAttention counts them.
    """

    name: ClassVar[str] = "retrieval"
    description: ClassVar[str] = "Everything for retrieval heads, the first and the most recent tokens for all others."
    papers: ClassVar[dict[str, str]] = {
        "DuoAttention": "https://arxiv.org/abs/2410.10819",
        "Retrieval Head": "https://arxiv.org/abs/2404.15574",
        "RazorAttention": "https://arxiv.org/abs/2407.15891",
    }

    artifact: str = Field(description="the head map as published, or what `convert` wrote")
    threshold: float | None = Field(None, description="least score of a retrieval head; the artifact's without")
    share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="retrieval heads among all KV heads; the artifact's without"
    )
    sink_tokens: Tokens | None = Field(None, description="first tokens; the artifact's or 64 without")
    recent_tokens: PositiveTokens | None = Field(
        None, description="last tokens, the current one included; the artifact's or 1024 without"
    )
    compensate: bool = Field(False, description="add the mean of what a head drops as one token (RazorAttention)")

    @model_validator(mode="after")
    def _fits(self) -> Retrieval:
        if self.threshold is not None and self.share is not None:
            raise ValueError("threshold and share exclude each other; give one of them")
        if self.frees_pages and self.compensate:
            raise ValueError("compensate sums up pages that kv_memory = per_head frees; give kv_memory=shared")
        return self

    @property
    def budget(self) -> int:
        return self.recent_tokens or 0  # of the heads that do not retrieve; without, the artifact says it

    def at_budget(self, tokens: int) -> dict[str, int]:
        return {} if self.recent_tokens is None else {"recent_tokens": tokens}

    @property
    def head_scope(self) -> Scope:
        return Scope.KV_HEAD

    @property
    def host_bound(self) -> str:
        return "compensate" if self.compensate else ""  # the pages that a row drops differ in number from row to row

    def window_plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        heads = load_artifact(self.artifact, "retrieval").resolve(model)
        retrieval = self.retrieval_heads(heads, heads.kv_heads or model.heads.kv_heads * model.ranks)
        return tuple(
            self._plan(layer, mine, heads, model)
            for layer, mine in enumerate(retrieval[:, model.my_heads(retrieval.shape[1])])
        )

    def retrieval_heads(self, heads: Artifact, kv_heads: int) -> Tensor:
        """Which KV heads of the model are retrieval heads, [L, H] bool."""
        scores = heads.tensors["scores"]
        scores = scores.view(scores.shape[0], kv_heads, -1).amax(2)
        given = {"threshold": self.threshold, "share": self.share}
        rules = [*given.items(), *heads.arguments["rule"].items()]
        rule, value = next((rule, value) for rule, value in rules if value is not None)
        if rule == "threshold":
            return scores.ge(value)
        best = scores.flatten().argsort(descending=True, stable=True)[: round(value * scores.numel())]
        return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(scores)

    def _plan(self, layer: int, retrieval: Tensor, heads: Artifact, model: ModelShape) -> LayerPlan:
        if retrieval.all():
            return LayerPlan(layer, Role.DENSE, dense_output=True)
        sink, recent = self._kept(heads)
        page = model.page_size if self.compensate else 1
        sink = -(-sink // page) * page
        window = Window(
            sink=torch.full(retrieval.shape, sink, dtype=torch.int32),
            alpha=torch.where(retrieval, 0, sink + recent)[:, None].double(),
            beta=retrieval[:, None].double(),
            align=page,
        )
        return LayerPlan(layer, Role.WINDOW, window=window)

    def _kept(self, heads: Artifact) -> tuple[int, int]:
        sink, recent = (heads.arguments[key] for key in ("sink_tokens", "recent_tokens"))
        sink = SINK_TOKENS if sink is None else sink
        recent = RECENT_TOKENS if recent is None else recent + 1
        return (
            sink if self.sink_tokens is None else self.sink_tokens,
            recent if self.recent_tokens is None else self.recent_tokens,
        )

    def page_state(self, heads: HeadShape, page_size: int) -> PageState | None:
        return PageState((2, heads.kv_heads, heads.head_dim)) if self.compensate else None  # means of keys, of values

    def update_pages(self, layer: SparseLayer, new: NewTokens) -> None:
        slots, size = new.slot_mapping, layer.kv.page_size
        full = slots[(slots >= 0) & ((slots + 1) % size == 0)] // size
        for half, pool in enumerate((layer.kv.key, layer.kv.value)):
            layer.state[full, half] = pool[full].float().mean(2).to(layer.state.dtype)

    def scored_bytes(self, plan: LayerPlan, model: ModelShape, length: int, element_bytes: int) -> int:
        if not self.compensate or plan.role is not Role.WINDOW:
            return 0
        return -(-length // model.page_size) * self.page_state_bytes(model.heads, model.page_size, element_bytes)

    def after_attend(self, layer: SparseLayer, query: Tensor, step: Step, out: Tensor) -> None:
        if layer.plan.role is not Role.WINDOW or layer.page_state is None:
            return
        spans = step.windows[layer.plan.layer].minimum(step.table.seq_lens[:, None, None])
        first, last = (spans // layer.kv.page_size).unbind(-1)  # [B, H], in pages
        key, value = mean_of_pages(layer.page_state, step.table.pages, first[:, 0], last.amax(1)).unbind(1)
        group = query.shape[1] // key.shape[1]
        key, value, drops = (part.repeat_interleave(group, 1) for part in (key, value, last > first))
        logit = layer.scale * (query.float() * key).sum(-1)
        weight = torch.where(drops, (logit - step.lse).sigmoid(), 0)[..., None]
        out.copy_(out.float().lerp(value, weight))


def mean_of_pages(state: Tensor, pages: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Means of the keys and of the values, [B, 2, H, D] fp32, in pages [first, last) [B] of every row; 0 for none."""
    means = []
    for row, start, end in zip(pages, first.tolist(), last.tolist(), strict=True):
        dropped = state.index_select(0, row[start:end])  # indexing is five times slower
        means.append(dropped.sum(0, dtype=torch.float32) / max(1, end - start))
    return torch.stack(means)
