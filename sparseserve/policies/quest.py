"""The pages whose key summaries promise the largest scores (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from sparseserve import ops
from sparseserve.model import ModelShape
from sparseserve.policies.base import SparseLayer
from sparseserve.policies.budget import ScorePolicy
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.types import Bound, HeadShape, LayerPlan, NewTokens, PageState, Role, Scope, Step


def _bound(value: object) -> object:
    # strict models take enum members only; files and flags give strings
    return Bound(value) if value in {bound.value for bound in Bound} else value


class Quest(ScorePolicy):
    """Selects units of tokens by a bound on q.k from the unit's key summary, kept in the tail of its page.

    The score of a KV head is the largest over its query heads. `min_max` is the paper's bound; `mean_std`
    (arXiv 2605.27740) takes mean + standard deviation per channel in its place. The last unit is always selected.
    """

    name: ClassVar[str] = "quest"
    description: ClassVar[str] = "The units whose key summaries promise the largest scores, chosen in every layer."
    papers: ClassVar[dict[str, str]] = {
        "Quest": "https://arxiv.org/abs/2406.10774",
        "UNIQUE": "https://arxiv.org/abs/2605.27740",
    }

    sink_tokens: Tokens = Field(16, description="first tokens, always attended to")
    recent_tokens: PositiveTokens = Field(64, description="last tokens, always attended to, the current one included")
    unit_tokens: Literal[16, 32, 64] = Field(32, description="tokens per unit of the selection")
    bound: Annotated[Bound, BeforeValidator(_bound)] = Field(Bound.MEAN_STD, description="how a unit is scored")
    dense_layers: Annotated[int, Field(ge=0)] = Field(2, description="first layers, dense as in the paper")

    @property
    def head_scope(self) -> Scope:
        return Scope.KV_HEAD

    @property
    def selection_unit(self) -> int:
        return self.unit_tokens

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        model.check_first_layers("dense_layers", self.dense_layers, default=2)
        return tuple(
            LayerPlan(layer, Role.DENSE, dense_output=True)
            if layer < self.dense_layers
            else self.select_plan(layer, model.heads)
            for layer in range(model.layers)
        )

    def page_state(self, heads: HeadShape, page_size: int) -> PageState | None:
        return PageState((heads.kv_heads, page_size // self.unit_tokens, 2, heads.head_dim))

    def update_pages(self, layer: SparseLayer, new: NewTokens) -> None:
        ops.summarize_pages(layer.kv.key, new.slot_mapping, layer.state, self.bound)

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        ops.score_pages(
            query,
            layer.state,
            step.table,
            self.unit_tokens,
            self.bound,
            scores=step.scores,
            wanted=self.wanted(layer.plan, step),
            scratch=step.scratch,
        )
