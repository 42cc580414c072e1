"""Windows that grow with the length, differently for every head (MoA, arXiv 2406.14909)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from sparseserve.model import ModelShape
from sparseserve.policies.artifact import load_artifact
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.policies.window import WindowPolicy
from sparseserve.types import LayerPlan, Role, Scope, Window


class Moa(WindowPolicy):
    """A query head of a row of N tokens spans alpha + beta * N of them: the sink and the most recent ones.

    N is the current length; MoA's own runtime takes the prompt and 1024 tokens, once. A KV head spans what the longest
    of its query heads does. The most recent tokens start at a page.
    """

    name: ClassVar[str] = "moa"
    description: ClassVar[str] = (
        "The first and the most recent tokens, as many as a plan gives each head at this length."
    )
    papers: ClassVar[dict[str, str]] = {"MoA": "https://arxiv.org/abs/2406.14909"}

    artifact: str = Field(description="the plan: moa_alpha_beta.json as published, or what `convert` wrote")
    sink_tokens: Tokens = Field(64, description="first tokens, always attended to")
    minimum_tokens: PositiveTokens = Field(128, description="tokens a head attends to at least, sink included")

    @model_validator(mode="after")
    def _fits(self) -> Moa:
        if self.sink_tokens >= self.minimum_tokens:
            raise ValueError(
                f"sink_tokens = {self.sink_tokens} leave no recent token of minimum_tokens = {self.minimum_tokens}; "
                "raise the minimum or keep fewer sink tokens"
            )
        return self

    @property
    def head_scope(self) -> Scope:
        return Scope.KV_HEAD

    @property
    def dense_up_to(self) -> int:
        return max(self.min_tokens, self.minimum_tokens)

    def window_plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        plan = load_artifact(self.artifact, "moa")
        plan.check(model)
        alpha, beta = (_my_groups(plan.tensors[name], model) for name in ("alpha", "beta"))
        sink = alpha.new_full((model.heads.kv_heads,), self.sink_tokens).int()
        return tuple(
            LayerPlan(
                layer,
                Role.WINDOW,
                window=Window(sink, alpha[layer], beta[layer], self.minimum_tokens, align=model.page_size),
            )
            for layer in range(model.layers)
        )


def _my_groups(per_query_head: Tensor, model: ModelShape) -> Tensor:
    """This rank's part of [L, Hq in all] as [L, H, G]; query head h belongs to KV head h // G."""
    groups = per_query_head.view(model.layers, -1, model.heads.queries_per_kv)
    return groups[:, model.my_heads(groups.shape[1])]
