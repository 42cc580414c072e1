"""Scores of units, from their summaries and from their keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseserve.reference.paging import logits, row_tokens, row_units
from sparseserve.reference.select import select_units
from sparseserve.types import Bound, PageTable, Wanted


def score_pages(
    query: Tensor,
    summary: Tensor,
    table: PageTable,
    unit_tokens: int,
    bound: Bound,
    scores: Tensor | None = None,
    wanted: Wanted | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `sparseserve.ops.score_pages`; `dtype` is that of the arithmetic."""
    if scores is None:
        shape = query.shape[0], summary.shape[1], table.pages.shape[1] * summary.shape[2]
        scores = query.new_full(shape, -torch.inf, dtype=dtype)
    for row, length in enumerate(table.seq_lens.tolist()):
        if length == 0:
            continue
        last = (length - 1) // unit_tokens
        center, half = row_units(summary, table.pages[row], last).to(dtype).unbind(2)  # [H, last, D]
        if bound is Bound.MIN_MAX:
            center, half = (center + half) / 2, (half - center) / 2
        queries = query[row].to(dtype).reshape(summary.shape[1], -1, query.shape[2])  # [H, G, D]
        bounds = queries @ center.transpose(1, 2) + queries.abs() @ half.transpose(1, 2)
        scores[row, :, :last] = bounds.amax(1)
        scores[row, :, last] = torch.inf
    if wanted is not None:
        select_units(scores, table.seq_lens, wanted)
    return scores


def score_tokens(
    query: Tensor,
    key: Tensor,
    table: PageTable,
    lse: Tensor,
    scale: float,
    scores: Tensor,
    unit_tokens: int,
    wanted: Wanted | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `sparseserve.ops.score_tokens`; `dtype` is that of the arithmetic."""
    for row, length in enumerate(table.seq_lens.tolist()):
        keys = row_tokens(key, table.pages[row], length)
        mass = (logits(query[row], keys, scale, dtype) - lse[row, :, None].to(dtype)).exp()  # [Hq, length]
        units = -(-length // unit_tokens)
        mass = pad(mass, (0, units * unit_tokens - length))
        heads = scores.shape[1]
        scores[row, :, :units] = mass.view(heads, len(mass) // heads, units, unit_tokens).sum((1, 3))
    if wanted is not None:
        select_units(scores, table.seq_lens, wanted)
    return scores
