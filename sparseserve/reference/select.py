"""The best units within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.types import Wanted


def select_units(scores: Tensor, seq_lens: Tensor, wanted: Wanted) -> None:
    """See `sparseserve.ops.select_units`."""
    selection, threshold = wanted.selection, wanted.threshold
    unit_tokens, slots = selection.unit_tokens, selection.units.shape[2]
    limits = torch.stack([wanted.sink, wanted.recent, wanted.budget], 1).tolist()
    for row, length in enumerate(seq_lens.tolist()):
        for head, (first, last, most) in enumerate(limits):
            if wanted.takes_all(row, length, most):
                selection.spans[row, head] = length
                selection.count[row, head] = 0
                continue
            middle = range(first // unit_tokens, -(-(length - last) // unit_tokens))
            candidates = scores[row, head, list(middle)].nan_to_num(-torch.inf, torch.inf, -torch.inf)
            best = candidates.sort(descending=True, stable=True).indices
            if threshold is None:
                best = best[: min(slots, max(0, wanted.budget_of(row, most) - first - last) // unit_tokens)]
            else:
                best = best[candidates[best] > threshold]
            start = min(first, length)
            selection.spans[row, head] = torch.tensor([start, max(length - last, start)])
            selection.units[row, head, : len(best)] = (best + middle.start).sort().values.int()
            selection.count[row, head] = len(best)
