"""Sink and recent tokens only (StreamingLLM, arXiv 2309.17453), at true positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from sparseserve.plan import ModelShape
from sparseserve.policies.base import Policy, PositiveTokens, Tokens
from sparseserve.types import LayerPlan, Role, Step


class Streaming(Policy):
    """Attends to the first `sink_tokens` and the last `recent_tokens`, the current token included."""

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "The first and the most recent tokens, for every head."
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2309.17453"

    sink_tokens: Tokens = Field(4, description="first tokens, always attended to")
    recent_tokens: PositiveTokens = Field(1020, description="last tokens, the current one included")

    @property
    def dense_up_to(self) -> int:
        return max(self.min_tokens, self.sink_tokens + self.recent_tokens)

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        return tuple(LayerPlan(layer, Role.WINDOW) for layer in range(model.layers))

    def expected_tokens(self, role: Role, length: int) -> int:
        return min(length, self.sink_tokens + self.recent_tokens)

    def prepare(self, step: Step) -> None:
        lengths = step.table.seq_lens[:, None]
        torch.clamp(lengths, max=self.sink_tokens, out=step.selection.spans[..., 0])
        torch.clamp(lengths - self.recent_tokens, min=0, out=step.selection.spans[..., 1])
