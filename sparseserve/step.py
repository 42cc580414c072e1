"""The buffers of a decode step."""

from __future__ import annotations

import torch

from sparseserve.policies.base import Policy
from sparseserve.types import HeadShape, PageTable, Selection, Step


class StepBuffers:
    """The buffers of a decode step, allocated once for `rows` rows of `max_len` tokens and `layers` layers."""

    def __init__(self, policy: Policy, heads: HeadShape, rows: int, max_len: int, layers: int) -> None:
        selection_heads = heads.selection_heads(policy.head_scope)
        unit = policy.selection_unit
        units = -(-max_len // unit) if policy.selection_slots else 0
        self._everything = Selection.empty(rows, 1, 0, unit)
        self._selection = Selection.empty(rows, selection_heads, policy.selection_slots, unit)
        # Untouched memory costs nothing: only the rows and lengths in use are ever written.
        self._scores = torch.empty(rows, selection_heads, units)
        self._lse = torch.empty(rows, heads.query_heads)
        self._attended_dense = torch.zeros(layers, rows, 1, dtype=torch.int32)
        self._attended = torch.zeros(layers, rows, selection_heads, dtype=torch.int32)

    def step(self, table: PageTable) -> Step:
        """The buffers cut to the rows of `table`."""
        rows = table.seq_lens.shape[0]
        everything = self._everything.rows(rows)
        everything.spans.copy_(table.seq_lens[:, None, None])
        return Step(
            table=table,
            everything=everything,
            selection=self._selection.rows(rows),
            scores=self._scores[:rows],
            lse=self._lse[:rows],
            attended_dense=self._attended_dense[:, :rows],
            attended=self._attended[:, :rows],
        )
