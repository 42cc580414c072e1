"""Position-persistent selection (TidalDecode, arXiv 2410.05076): two layers choose tokens, the others reuse them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from sparseserve import ops
from sparseserve.errors import MISSING, ConfigError
from sparseserve.model import ModelShape
from sparseserve.policies.base import SparseLayer
from sparseserve.policies.budget import ScorePolicy
from sparseserve.types import LayerPlan, Role, Scope, Step


class Reselection(NamedTuple):
    """Where a model chooses its tokens again."""

    model: str  # what the lower-case name of the model must contain
    layers: int  # L of that model
    layer: int
    source: str


TIDAL_PAPER = "arXiv 2410.05076"
LESS_IS_MORE = "github.com/DerrickYLJ/LessIsMore, run_eval_slurm.sh"
# Missing on purpose: Llama-3-70B, for which the paper counts 64 layers and the model has 80.
RESELECTIONS = [
    Reselection("llama-2-7b", 32, 7, TIDAL_PAPER),
    Reselection("longchat-7b", 32, 7, TIDAL_PAPER),
    Reselection("llama-3-8b", 32, 13, "github.com/DerrickYLJ/TidalDecode, the default of enable_tidal"),
    Reselection("llama-3.1-8b", 32, 13, "github.com/DerrickYLJ/LessIsMore, its kernels' layers 2 and 13"),
    Reselection("llama-3.2-3b", 28, 13, f"{TIDAL_PAPER}, as 12 to 13"),
    Reselection("qwen3-8b", 36, 12, LESS_IS_MORE),
    Reselection("qwen3-4b", 36, 20, LESS_IS_MORE),
]


def _scope(value: object) -> object:
    # strict models take enum members only; files and flags give strings
    return Scope(value) if value in {scope.value for scope in Scope} else value


def _layers(value: object) -> object:
    # files and flags give one layer or a list; strict models take tuples only
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or any(a >= b for a, b in pairwise(layers)):
        raise PydanticCustomError("layers", "Input should be a layer such as 13, or ascending ones such as [9, 18]")
    return layers


Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[
    tuple[Layer, ...],
    BeforeValidator(_layers, json_schema_input_type=Layer | Annotated[list[Layer], Field(min_length=1)]),
    AfterValidator(_ascending),
]


class Tidal(ScorePolicy):
    """Dense before `select_layer`; that layer and `reselect_layer` attend densely and choose for the layers after them.

    Tokens are ranked by post-softmax attention mass, summed over the heads that share a selection: the group of a
    KV head (`kv_head`), one query head as in the paper (`query_head`), or all (`all_heads`). The current token is
    always kept. `unit_tokens` of 1 is the paper; larger units are ranked by the mass of their tokens.
    """

    name: ClassVar[str] = "tidal"
    description: ClassVar[str] = "Two layers choose tokens by attention mass, the layers between and after reuse them."
    papers: ClassVar[dict[str, str]] = {"TidalDecode": "https://arxiv.org/abs/2410.05076"}
    for_any_model: ClassVar[bool] = False

    select_layer: Layer = Field(2, description="first selection layer, dense before it")
    reselect_layer: Layers | None = Field(
        None, description="second selection layer, or a list of more; without it the one published for the model"
    )
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
        layers = (published_reselection(model),) if self.reselect_layer is None else self.reselect_layer
        for layer in layers:
            model.check_layer("reselect_layer", layer, first=self.select_layer)
        return tuple(self._plan(layer, {self.select_layer, *layers}, model) for layer in range(model.layers))

    def _plan(self, layer: int, selecting: set[int], model: ModelShape) -> LayerPlan:
        if layer < self.select_layer:
            return LayerPlan(layer, Role.DENSE, dense_output=True)
        if layer in selecting:
            return self.select_plan(layer, model.heads, dense_output=True)
        return LayerPlan(layer, Role.REUSE)

    def scored_bytes(self, plan: LayerPlan, model: ModelShape, length: int, element_bytes: int) -> int:
        heads = model.heads
        return length * heads.kv_heads * heads.head_dim * element_bytes if plan.role is Role.SELECT else 0

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        ops.score_tokens(
            query,
            layer.kv.key,
            step.table,
            step.lse,
            layer.scale,
            unit_tokens=self.unit_tokens,
            scores=step.scores,
            wanted=self.wanted(layer.plan, step),
            scratch=step.scratch,
        )


def published_reselection(model: ModelShape) -> int:
    """The second selection layer that was published for a model; ConfigError for any other."""
    # A snapshot of the hub has the model's name in a folder above.
    for part in reversed(Path(model.name.lower()).parts):
        for row in RESELECTIONS:
            if row.model in part and row.layers == model.layers:
                return row.layer
    known = ", ".join(f"{row.model} ({row.layers} layers: {row.layer})" for row in RESELECTIONS)
    raise ConfigError(
        "reselect_layer",
        MISSING,
        allowed=f"a layer up to {model.layers - 1} for {model.name}; published are {known}",
        remedy="give --set reselect_layer=N; measure N with sparseserve calibrate tidal MODEL -o policy.yaml",
    )
