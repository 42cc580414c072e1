"""Summaries of units."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.types import Bound


def summarize_pages(key: Tensor, slots: Tensor, summary: Tensor, unit_tokens: int, bound: Bound) -> None:
    """See `sparseserve.ops.summarize_pages`."""
    units_per_page = summary.shape[2]
    for keys, slot in zip(key.float(), slots.tolist(), strict=True):
        if slot < 0:
            continue
        unit, offset = divmod(slot, unit_tokens)
        page, unit = divmod(unit, units_per_page)
        first, second = summary[page, :, unit].unbind(1)  # [H, D] each
        if bound is Bound.MIN_MAX:
            first.copy_(keys if offset == 0 else torch.minimum(first, keys))
            second.copy_(keys if offset == 0 else torch.maximum(second, keys))
        else:
            first.copy_(keys if offset == 0 else first + keys)
            second.copy_(keys * keys if offset == 0 else second + keys * keys)
