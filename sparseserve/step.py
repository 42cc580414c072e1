"""The buffers of a decode step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparseserve.policies.base import Policy
from sparseserve.types import HeadShape, LayerPlan, PageTable, Selection, Step, Window


class StepBuffers:
    """The buffers of a decode step, allocated once for `rows` rows of `max_len` tokens and the layers of `plans`."""

    def __init__(self, policy: Policy, plans: Sequence[LayerPlan], heads: HeadShape, rows: int, max_len: int) -> None:
        selection_heads = heads.selection_heads(policy.head_scope)
        unit = policy.selection_unit
        slots = policy.selection_slots(max_len)
        units = -(-max_len // unit) if slots else 0
        self._everything = Selection.empty(rows, 1, 0, unit)
        self._selection = Selection.empty(rows, selection_heads, slots, unit)
        self._window = _stack(plans, selection_heads)
        self._windows = torch.zeros(self._window.sink.shape[0], rows, selection_heads, 2, dtype=torch.int32)
        # Untouched memory costs nothing: only the rows and lengths in use are ever written.
        self._scores = torch.empty(rows, selection_heads, units)
        self._lse = torch.empty(rows, heads.query_heads)
        self._attended_dense = torch.zeros(len(plans), rows, 1, dtype=torch.int32)
        self._attended = torch.zeros(len(plans), rows, selection_heads, dtype=torch.int32)

    def step(self, table: PageTable) -> Step:
        """The buffers cut to the rows of `table`."""
        rows = table.seq_lens.shape[0]
        everything = self._everything.rows(rows)
        everything.spans.copy_(table.seq_lens[:, None, None])
        windows = self._windows[:, :rows].copy_(self._window.spans(table.seq_lens))
        return Step(
            table=table,
            everything=everything,
            selection=self._selection.rows(rows),
            windows=windows,
            scores=self._scores[:rows],
            lse=self._lse[:rows],
            attended_dense=self._attended_dense[:, :rows],
            attended=self._attended[:, :rows],
        )


def _stack(plans: Sequence[LayerPlan], heads: int) -> Window:
    """The windows of all layers as one, [L, 1, Hs] each, empty for layers without one; L = 0 if no layer has one."""
    windows = [plan.window for plan in plans if plan.window is not None]
    if not windows:
        nothing = torch.zeros(0, 1, heads)
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
