"""The buffers of a decode step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.ops import step_scratch
from sparseserve.policies.base import Policy
from sparseserve.types import CPU, POLICY_BUDGET, HeadShape, LayerPlan, Measurement, PageTable, Selection, Step, Window

PROMPT_PIECE = 128  # tokens of a prompt that windowed heads attend for at a time; on CUDA at least


@dataclass(frozen=True, slots=True)
class StepWorkspace:
    """What is large of a step; layers use it one after the other."""

    scores: Tensor  # [B, Hs, T] fp32
    scratch: Tensor | None  # of `step_scratch`, not on the CPU

    @classmethod
    def allocate(cls, policy: Policy, heads: HeadShape, rows: int, max_len: int, device: torch.device) -> StepWorkspace:
        """For `rows` rows of up to `max_len` tokens."""
        shape = rows, heads.selection_heads(policy.head_scope), policy.scored_units(max_len)
        # Untouched memory costs nothing on the CPU: only the rows and lengths in use are ever written.
        scores = torch.empty(shape, device=device)
        if device.type == "cpu":
            return cls(scores, None)
        most = max(rows, PROMPT_PIECE) if policy.frees_pages else rows
        return cls(scores, step_scratch(most, heads.query_heads, heads.head_dim, device))

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
        memory: StepWorkspace | None = None,
    ) -> None:
        selection_heads = heads.selection_heads(policy.head_scope)
        unit = policy.selection_unit
        slots = policy.selection_units(max_len)
        self._everything = Selection.empty(rows, 1, 0, unit, device)
        self._selection = Selection.empty(rows, selection_heads, slots, unit, device)
        self._window = _stack(plans, selection_heads, device)
        layers = self._window.sink.shape[0]
        self._windows = torch.zeros(layers, rows, selection_heads, 2, dtype=torch.int32, device=device)
        self._memory = memory or StepWorkspace.allocate(policy, heads, rows, max_len, device)
        self._lse = torch.empty(rows, heads.query_heads, device=device)
        self._attended_dense = torch.zeros(len(plans), rows, 1, dtype=torch.int32, device=device)
        self._attended = torch.zeros(len(plans), rows, selection_heads, dtype=torch.int32, device=device)
        self._row_budget = torch.zeros(rows, dtype=torch.int32, device=device)
        self.measurement = _measurement(plans, rows, device) if policy.recall_sample else None

    def step(
        self,
        table: PageTable,
        whole: Tensor | None = None,
        row_budget: Tensor | None = None,
        measured: Collection[int] = (),
        launched: Collection[int] | None = None,
    ) -> Step:
        """The buffers cut to the rows of `table`.

        Rows that are `whole` [B] bool attend to everything in all layers; `row_budget` [B] int32 tokens holds in place
        of the plan's where it is not POLICY_BUDGET. The layers `measured` are compared with dense attention. A captured
        graph makes the launches of the layers `launched` in every step, for nothing in those that are not measured.
        """
        rows = table.seq_lens.shape[0]
        everything = self._everything.rows(rows)
        everything.spans.copy_(table.seq_lens[:, None, None])
        windows = self._windows[:, :rows].copy_(self._window.spans(table.seq_lens))
        own = torch.full_like(table.seq_lens, POLICY_BUDGET) if row_budget is None else row_budget
        if whole is not None:
            own = torch.where(whole, table.seq_lens, own)
            windows.clamp_(min=(table.seq_lens * whole)[:, None, None])
        return Step(
            table=table,
            everything=everything,
            selection=self._selection.rows(rows),
            windows=windows,
            scores=self._memory.scores[:rows],
            lse=self._lse[:rows],
            attended_dense=self._attended_dense[:, :rows],
            attended=self._attended[:, :rows],
            row_budget=None if whole is None and row_budget is None else self._row_budget[:rows].copy_(own),
            scratch=self._memory.scratch,
            measurement=self._measure(table.seq_lens, whole, measured, launched),
        )

    def _measure(
        self, seq_lens: Tensor, whole: Tensor | None, measured: Collection[int], launched: Collection[int] | None
    ) -> Measurement | None:
        if self.measurement is None or not (measured or launched):
            return None
        rows = seq_lens.shape[0]
        spans = self.measurement.spans[:, :rows]
        spans[..., 0] = 0
        spans[..., 1] = seq_lens[:, None]
        for layer in measured:
            spans[layer, :, :, 0] = (seq_lens if whole is None else seq_lens * ~whole)[:, None]
        recall, error = self.measurement.recall[:, :rows], self.measurement.error[:, :rows]
        return Measurement(measured if launched is None else launched, spans, recall, error)


def _measurement(plans: Sequence[LayerPlan], rows: int, device: torch.device) -> Measurement:
    spans = torch.zeros(len(plans), rows, 1, 2, dtype=torch.int32, device=device)
    recall, error = torch.full((2, len(plans), rows), torch.nan, device=device)
    return Measurement((), spans, recall, error)


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
