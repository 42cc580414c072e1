"""Sink and recent tokens only (StreamingLLM, arXiv 2309.17453), at true positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from sparseserve.model import ModelShape
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.policies.window import WindowPolicy
from sparseserve.types import LayerPlan, Role, Window


class Streaming(WindowPolicy):
    """Attends to the first `sink_tokens` and the last `recent_tokens`, the current token included."""

    name: ClassVar[str] = "streaming"
    description: ClassVar[str] = "The first and the most recent tokens, for every head."
    papers: ClassVar[dict[str, str]] = {"StreamingLLM": "https://arxiv.org/abs/2309.17453"}
    finds_single_tokens: ClassVar[bool] = False

    sink_tokens: Tokens = Field(4, description="first tokens, always attended to")
    recent_tokens: PositiveTokens = Field(1020, description="last tokens, the current one included")

    @property
    def budget(self) -> int:
        return self.sink_tokens + self.recent_tokens

    def at_budget(self, tokens: int) -> dict[str, int]:
        return {"recent_tokens": tokens - self.sink_tokens}

    @property
    def dense_up_to(self) -> int:
        return max(self.min_tokens, self.budget)

    def window_plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        window = Window(
            sink=torch.tensor([self.sink_tokens], dtype=torch.int32),
            alpha=torch.tensor([[self.sink_tokens + self.recent_tokens]], dtype=torch.float64),
            beta=torch.zeros(1, 1, dtype=torch.float64),
        )
        return tuple(LayerPlan(layer, Role.WINDOW, window=window) for layer in range(model.layers))
