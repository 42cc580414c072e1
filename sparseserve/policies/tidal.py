"""Position-persistent selection (TidalDecode, arXiv 2410.05076): two layers choose tokens, the others reuse them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from sparseserve import ops
from sparseserve.plan import ModelShape
from sparseserve.policies.base import BudgetPolicy
from sparseserve.types import LayerPlan, PagedKV, Role, Scope, Step


def _scope(value: object) -> object:
    # strict models take enum members only; files and flags give strings
    return Scope(value) if value in {scope.value for scope in Scope} else value


class Tidal(BudgetPolicy):
    """Dense before `select_layer`; that layer and `reselect_layer` attend densely and choose for the layers after them.

    Tokens are ranked by post-softmax attention mass, summed over the heads that share a selection: the group of a
    KV head (`kv_head`), one query head as in the paper (`query_head`), or all (`all_heads`). The current token is
    always kept. `unit_tokens` of 1 is the paper; larger units are ranked by the mass of their tokens.
    """

    name: ClassVar[str] = "tidal"
    summary: ClassVar[str] = "Two layers choose tokens by attention mass, the layers between and after reuse them."
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2410.05076"

    select_layer: Annotated[int, Field(ge=0)] = Field(2, description="first selection layer, dense before it")
    reselect_layer: Annotated[int, Field(ge=0)] = Field(description="second selection layer, 13 for Llama-3.1-8B")
    scope: Annotated[Scope, BeforeValidator(_scope)] = Field(Scope.KV_HEAD, description="heads that share a selection")
    unit_tokens: Literal[1, 16, 32, 64] = Field(1, description="tokens per unit of the selection")

    @property
    def head_scope(self) -> Scope:
        return self.scope

    @property
    def selection_unit(self) -> int:
        return self.unit_tokens

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        model.check_layer("select_layer", self.select_layer)
        model.check_layer("reselect_layer", self.reselect_layer, first=self.select_layer)
        return tuple(self._plan(layer, model) for layer in range(model.layers))

    def _plan(self, layer: int, model: ModelShape) -> LayerPlan:
        if layer < self.select_layer:
            return LayerPlan(layer, Role.DENSE, dense_output=True)
        if layer in (self.select_layer, self.reselect_layer):
            return self.select_plan(layer, model.heads, dense_output=True)
        return LayerPlan(layer, Role.REUSE)

    def select(
        self, query: Tensor, kv: PagedKV, summary: Tensor | None, plan: LayerPlan, step: Step, scale: float
    ) -> None:
        assert plan.sink is not None and plan.recent is not None and plan.budget is not None
        table = step.table
        ops.score_tokens(
            query,
            kv.key,
            table.pages,
            table.seq_lens,
            step.lse,
            scale,
            unit_tokens=self.unit_tokens,
            scores=step.scores,
        )
        ops.select_units(step.scores, table.seq_lens, plan.sink, plan.recent, plan.budget, step.selection)
