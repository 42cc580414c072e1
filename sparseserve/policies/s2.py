"""Local blocks and every n-th block, another one for each head (S2-Attention, arXiv 2407.17678)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparseserve.artifacts.s2 import TRAINED_OFFSET, first_blocks
from sparseserve.model import ModelShape
from sparseserve.policies.artifact import load_artifact
from sparseserve.policies.base import Policy
from sparseserve.types import CPU, LayerPlan, Role, Scope, Step, Window

Blocks = Annotated[int, Field(ge=1)]
TRAINED = {"scope": "query_head", "offset_blocks": TRAINED_OFFSET}


class S2(Policy):
    """Head h attends to block j if it is one of the last `local_blocks` or (j + h * step + offset) % stride == 0.

    step = max(1, stride // heads) over the heads of all ranks. Models are trained with this pattern; on others it is a
    baseline. What the config.json of such a model says comes first, then --set.
    """

    name: ClassVar[str] = "s2"
    description: ClassVar[str] = (
        "The most recent blocks and every n-th block before them, which ones depends on the head."
    )
    papers: ClassVar[dict[str, str]] = {"S2-Attention": "https://arxiv.org/abs/2407.17678"}
    for_any_model: ClassVar[bool] = False
    finds_single_tokens: ClassVar[bool] = False

    artifact: str | None = Field(None, description="config.json with blocksparse_* fields, or what `convert` wrote")
    block_tokens: Literal[16, 32, 64, 128] = Field(64, description="tokens per block")
    local_blocks: Blocks = Field(16, description="last blocks, the current one included")
    stride: Blocks = Field(8, description="blocks from one distant block to the next")
    homo_heads: bool = Field(False, description="the same distant blocks for every head")
    offset_blocks: Annotated[int, Field(ge=0)] = Field(0, description="head h keeps block 0 if stride divides h + this")
    dense_every: Blocks | None = Field(None, description="every n-th layer is dense; without it none")
    dense_heads: Annotated[int, Field(ge=0)] = Field(0, description="last heads, which attend to everything")
    scope: Literal["kv_head", "query_head"] = Field("kv_head", description="heads that share a pattern")

    @model_validator(mode="before")
    @classmethod
    def _from_artifact(cls, values: Any) -> Any:
        source = values.get("artifact") if isinstance(values, dict) else None
        if not isinstance(source, str):
            return values
        given = load_artifact(source, "s2").arguments
        return {
            "block_tokens": given["block_size"],
            "local_blocks": given["num_local_blocks"],
            "stride": given["vert_stride"],
            "homo_heads": given["homo_head"],
            "dense_every": given["dense_every"],
            **TRAINED,
            **values,
        }

    @property
    def head_scope(self) -> Scope:
        return Scope(self.scope)

    @property
    def selection_unit(self) -> int:
        return self.block_tokens

    def selection_units(self, max_len: int) -> int:
        return -(-max_len // (self.block_tokens * self.stride))

    @property
    def dense_up_to(self) -> int:
        return max(self.min_tokens, self.block_tokens * self.local_blocks)

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        if self.artifact is not None:
            load_artifact(self.artifact, "s2").check(model)
        heads, total = self._heads(model)
        dense = heads >= total - self.dense_heads
        # N - alpha lies in the first local block, wherever in its own block the current token is.
        alpha = torch.where(dense, 0, self.block_tokens * (self.local_blocks - 1) + 1).double()
        window = Window(
            sink=torch.zeros_like(heads).int(),
            alpha=alpha[:, None],
            beta=dense[:, None].double(),
            align=self.block_tokens,
        )
        first = self._first_blocks(model)
        return tuple(
            LayerPlan(layer, Role.DENSE, dense_output=True)
            if self.dense_every is not None and (layer + 1) % self.dense_every == 0
            else LayerPlan(layer, Role.WINDOW, window=window, first_unit=first)
            for layer in range(model.layers)
        )

    def prepare(self, step: Step, model: ModelShape) -> None:
        units = step.selection.units
        first = self._first_blocks(model, units.device)
        units.copy_(first[:, None] + self.stride * torch.arange(units.shape[2], device=units.device))
        blocks = -(-step.table.seq_lens // self.block_tokens)
        count = -(-(blocks[:, None] - first) // self.stride)
        step.selection.count.copy_(count.clamp(min=0))

    def expected_tokens(self, plan: LayerPlan, length: int) -> float:
        local = super().expected_tokens(plan, length)
        if plan.window is None or plan.first_unit is None or length <= self.dense_up_to:
            return local
        before = plan.window.at(length)[1] // self.block_tokens  # [Hs]
        distant = -(-(before - plan.first_unit) // self.stride)
        return local + self.block_tokens * float(distant.clamp(min=0).double().mean())

    def _first_blocks(self, model: ModelShape, device: torch.device = CPU) -> Tensor:
        """The first distant block of each of this rank's selection heads, [Hs]."""
        return first_blocks(*self._heads(model, device), self.stride, self.homo_heads, self.offset_blocks)

    def _heads(self, model: ModelShape, device: torch.device = CPU) -> tuple[Tensor, int]:
        """This rank's selection heads by their number in the model, [Hs], and how many that has."""
        mine = model.heads.selection_heads(self.head_scope)
        return model.rank * mine + torch.arange(mine, device=device), model.ranks * mine
