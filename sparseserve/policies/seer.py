"""Blocks that a learned gate selects (SeerAttention-R, arXiv 2506.08889)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from math import log
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparseserve import ops
from sparseserve.errors import ArtifactError, Problem, UnsupportedError
from sparseserve.model import ModelShape
from sparseserve.policies.artifact import load_artifact
from sparseserve.policies.base import SparseLayer
from sparseserve.policies.budget import ScorePolicy
from sparseserve.policies.serving import PositiveTokens, Tokens
from sparseserve.types import Budgets, Gate, HeadShape, LayerPlan, NewTokens, PageState, Role, Scope, Step

if TYPE_CHECKING:
    from sparseserve.artifacts import Artifact


class Seer(ScorePolicy):
    """A KV head attends to the blocks that its gate expects the most attention in, and always to the last block.

    The gate sees queries and keys before their rotation, as it was trained: both are un-rotated at their positions. The
    budget includes the last block. `threshold` takes every block to which the gate gives a larger share, in place of a
    budget. Block size, norms and rotation are the artifact's; its own budget and threshold are placeholders in the
    published files and stay unread.
    """

    name: ClassVar[str] = "seer"
    description: ClassVar[str] = "The blocks that a trained gate expects the most attention in, chosen in every layer."
    papers: ClassVar[dict[str, str]] = {"SeerAttention-R": "https://arxiv.org/abs/2506.08889"}

    artifact: str = Field(description="the decode gates: a folder as published, or what `convert` wrote")
    budget_tokens: PositiveTokens = Field(2048, description="tokens a head attends to, the last block included")
    recent_tokens: Tokens = Field(0, description="last tokens, always attended to beside the last block")
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="attend to the blocks with a larger share of the gate's softmax, whatever the budget"
    )
    dense_layers: Tokens = Field(0, description="first layers that stay dense; the artifact may ask for more")

    @cached_property
    def _gates(self) -> Artifact:
        gates = load_artifact(self.artifact, "seer")
        for name, most in (("block_size", 4096), ("gate_dim", 256)):
            if (value := gates.arguments[name]) % 16 or value > most:
                allowed = f"a multiple of 16 up to {most}"
                remedy = "take gates of another shape, or another policy"
                raise ArtifactError(Problem(name, value, allowed, remedy=remedy, where=self.artifact))
        return gates

    @property
    def head_scope(self) -> Scope:
        return Scope.KV_HEAD

    @property
    def selection_unit(self) -> int:
        unit: int = self._gates.arguments["block_size"]
        return unit

    @property
    def budgets(self) -> Budgets | None:
        return super().budgets if self.threshold is None else None

    def selection_units(self, max_len: int) -> int:
        return super().selection_units(max_len) if self.threshold is None else -(-max_len // self.selection_unit)

    @property
    def dense_up_to(self) -> int:
        return super().dense_up_to if self.threshold is None else self.min_tokens

    def expected_tokens(self, plan: LayerPlan, length: int) -> float:
        return super().expected_tokens(plan, length) if self.threshold is None else length

    def check_budget(self) -> None:
        if self.threshold is None:
            super().check_budget()

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        self._gates.check(model)
        if model.page_size % self.selection_unit:
            allowed = f"a multiple of {self.selection_unit}, the block of the gates"
            remedy = f"give --block-size {-(-model.page_size // self.selection_unit) * self.selection_unit}"
            raise UnsupportedError(Problem("--block-size", model.page_size, allowed, remedy=remedy))
        dense = max(self.dense_layers, self._gates.arguments["start_layer"])
        model.check_first_layers("dense_layers", dense, default=0)
        group = self._gates.tensors["query.0"].shape[1]
        if group != model.heads.queries_per_kv:
            allowed = f"at most {self._gates.kv_heads}: these gates judge the {group} query heads of a KV head at once"
            raise UnsupportedError(Problem("--tensor-parallel-size", model.ranks, allowed, remedy="use fewer ranks"))
        unrope, rope = self._rotations(model)
        return tuple(
            LayerPlan(layer, Role.DENSE, dense_output=True)
            if layer < dense
            else replace(self.select_plan(layer, model.heads), gate=self._gate(layer, model, unrope, rope))
            for layer in range(model.layers)
        )

    def _rotations(self, model: ModelShape) -> tuple[Tensor, Tensor | None]:
        """What undoes the model's rotation, amplitude included, and the gate's own rotation.

        yarn's amplitude stays in the gate's own: training applied the model's rotary embedding to it as it was.
        """
        if model.rope is None:
            allowed = "a model with rotary position embedding"
            raise UnsupportedError(Problem("model", model.name, allowed, remedy="take a policy without gates"))
        rope: Callable[[int], Tensor] = model.rope
        table = rope(model.heads.head_dim)
        cos, sin = table.chunk(2, -1)
        unrope = table / (cos * cos + sin * sin).repeat(1, 2)
        return unrope, rope(self._gates.arguments["gate_dim"]) if self._gates.arguments["use_rope"] else None

    def _gate(self, layer: int, model: ModelShape, unrope: Tensor, rope: Tensor | None) -> Gate:
        def tensor(name: str) -> Tensor:
            return self._gates.tensors[f"{name}.{layer}"].float()

        mine, normed = model.my_heads(self._gates.heads), self._gates.arguments["use_qk_norm"]
        return Gate(
            query=tensor("query")[mine].contiguous(),
            key=tensor("key")[mine].contiguous(),
            query_norm=tensor("query_norm") if normed else None,
            key_norm=tensor("key_norm") if normed else None,
            unrope=unrope,
            rope=rope,
        )

    def page_state(self, heads: HeadShape, page_size: int) -> PageState | None:
        gate_keys = heads.kv_heads, page_size // self.selection_unit, self._gates.arguments["gate_dim"]
        return PageState(gate_keys, torch.float32)

    def scored_bytes(self, plan: LayerPlan, model: ModelShape, length: int, element_bytes: int) -> float:
        weights = 0 if plan.gate is None else 4 * plan.gate.query.numel()
        return weights + super().scored_bytes(plan, model, length, element_bytes)

    def update_pages(self, layer: SparseLayer, new: NewTokens) -> None:
        if layer.plan.gate is not None:
            ops.summarize_gates(layer.kv.key, new.slot_mapping, new.positions, layer.plan.gate, layer.state)

    def select(self, layer: SparseLayer, query: Tensor, step: Step) -> None:
        assert layer.plan.gate is not None
        wanted = self.wanted(layer.plan, step, None if self.threshold is None else log(self.threshold))
        ops.score_gates(query, layer.state, step.table, self.selection_unit, layer.plan.gate, step.scores, wanted)
