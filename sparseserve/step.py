"""The buffers of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.ops import step_scratch
from sparseserve.policies.base import Policy
from sparseserve.types import CPU, HeadShape, LayerPlan, PageTable, Selection, Step, Window


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What is large of a step; layers use it one after the other."""

    scores: Tensor  # [B, Hs, T] fp32
    scratch: Tensor | None  # of `step_scratch`, not on the CPU

    @classmethod
    def allocate(cls, policy: Policy, heads: HeadShape, rows: int, max_len: int, device: torch.device) -> StepMemory:
        """For `rows` rows of up to `max_len` tokens."""
        shape = rows, heads.selection_heads(policy.head_scope), policy.scored_units(max_len)
        # Untouched memory costs nothing on the CPU: only the rows and lengths in use are ever written.
        scores = torch.empty(shape, device=device)
        on_cpu = device.type == "cpu"
        return cls(scores, None if on_cpu else step_scratch(rows, heads.query_heads, heads.head_dim, device))

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.scores.nbytes + (0 if self.scratch is None else self.scratch.nbytes)


class StepBuffers:
    """The buffers of a decode step, allocated once for `rows` rows of `max_len` tokens and the layers of `plans`.

    They stay where they are, as captured CUDA graphs need; the tensors of `plans` must be on `device`. `memory`, for as
    many rows and tokens, may exist already.
    """

    def __init__(
        self,
        policy: Policy,
        plans: Sequence[LayerPlan],
        heads: HeadShape,
        rows: int,
        max_len: int,
        device: torch.device = CPU,
        memory: StepMemory | None = None,
    ) -> None:
        selection_heads = heads.selection_heads(policy.head_scope)
        unit = policy.selection_unit
        slots = policy.selection_slots(max_len)
        self._everything = Selection.empty(rows, 1, 0, unit, device)
        self._selection = Selection.empty(rows, selection_heads, slots, unit, device)
        self._window = _stack(plans, selection_heads, device)
        layers = self._window.sink.shape[0]
        self._windows = torch.zeros(layers, rows, selection_heads, 2, dtype=torch.int32, device=device)
        self._memory = memory or StepMemory.allocate(policy, heads, rows, max_len, device)
        self._lse = torch.empty(rows, heads.query_heads, device=device)
        self._attended_dense = torch.zeros(len(plans), rows, 1, dtype=torch.int32, device=device)
        self._attended = torch.zeros(len(plans), rows, selection_heads, dtype=torch.int32, device=device)
        self._row_budget = torch.zeros(rows, dtype=torch.int32, device=device)
        # Layers with dense output keep everything and never write theirs.
        self._recall = torch.ones(len(plans), rows, device=device) if policy.measure_recall else None

    def step(self, table: PageTable, whole: Tensor | None = None) -> Step:
        """The buffers cut to the rows of `table`; rows that are `whole` [B] bool attend to everything in all layers."""
        rows = table.seq_lens.shape[0]
        everything = self._everything.rows(rows)
        everything.spans.copy_(table.seq_lens[:, None, None])
        windows = self._windows[:, :rows].copy_(self._window.spans(table.seq_lens))
        lengths = None
        if whole is not None:
            lengths = self._row_budget[:rows].copy_(table.seq_lens * whole)
            windows.clamp_(min=lengths[:, None, None])
        return Step(
            table=table,
            everything=everything,
            selection=self._selection.rows(rows),
            windows=windows,
            scores=self._memory.scores[:rows],
            lse=self._lse[:rows],
            attended_dense=self._attended_dense[:, :rows],
            attended=self._attended[:, :rows],
            row_budget=lengths,
            scratch=self._memory.scratch,
            recall=None if self._recall is None else self._recall[:, :rows],
        )


def _stack(plans: Sequence[LayerPlan], heads: int, device: torch.device) -> Window:
    """The windows of all layers as one, [L, 1, Hs] each, empty for layers without one; L = 0 if no layer has one."""
    windows = [plan.window for plan in plans if plan.window is not None]
    if not windows:
        nothing = torch.zeros(0, 1, heads, device=device)
        return Window(nothing.int(), nothing[..., None].double(), nothing[..., None].double())
    first = windows[0]
    empty = Window(torch.zeros_like(first.sink), torch.zeros_like(first.alpha), torch.zeros_like(first.beta))
    layers = [plan.window or empty for plan in plans]
    return Window(
        sink=torch.stack([window.sink for window in layers])[:, None],
        alpha=torch.stack([window.alpha for window in layers])[:, None],
        beta=torch.stack([window.beta for window in layers])[:, None],
        minimum=first.minimum,
        align=first.align,
    )
