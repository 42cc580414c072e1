"""The best units within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.types import Selection


def select_units(
    scores: Tensor, seq_lens: Tensor, sink: Tensor, recent: Tensor, budget: Tensor, selection: Selection
) -> None:
    """See `sparseserve.ops.select_units`."""
    unit_tokens, slots = selection.unit_tokens, selection.units.shape[2]
    for row, length in enumerate(seq_lens.tolist()):
        for head, (first, last, most) in enumerate(zip(sink.tolist(), recent.tolist(), budget.tolist(), strict=True)):
            if length <= most:
                selection.spans[row, head] = length
                selection.count[row, head] = 0
                continue
            middle = range(first // unit_tokens, -(-(length - last) // unit_tokens))
            count = min(len(middle), (most - first - last) // unit_tokens, slots)
            candidates = scores[row, head, middle.start : middle.stop].nan_to_num(-torch.inf, torch.inf, -torch.inf)
            best = candidates.sort(descending=True, stable=True).indices[:count] + middle.start
            selection.spans[row, head] = torch.tensor([first, length - last])
            selection.units[row, head, :count] = best.sort().values.int()
            selection.count[row, head] = count
