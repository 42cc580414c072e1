"""Summaries of units."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.types import Bound


def summarize_pages(
    key: Tensor, slots: Tensor, summary: Tensor, bound: Bound, dtype: torch.dtype = torch.float32
) -> None:
    """See `sparseserve.ops.summarize_pages`; `dtype` is that of the arithmetic."""
    page_size = key.shape[2]
    unit_tokens = page_size // summary.shape[2]
    for slot in slots.tolist():
        if slot < 0 or (slot + 1) % unit_tokens:
            continue
        page, last = divmod(slot, page_size)
        keys = key[page, :, last + 1 - unit_tokens : last + 1].to(dtype)  # [H, unit_tokens, D]
        pair = (keys.amin(1), keys.amax(1)) if bound is Bound.MIN_MAX else (keys.mean(1), keys.std(1, correction=0))
        summary[page, :, last // unit_tokens] = torch.stack(pair, 1).to(summary.dtype)
