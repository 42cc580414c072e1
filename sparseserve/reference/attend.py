"""Attention over a selection."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.reference.paging import logits, row_tokens
from sparseserve.types import PagedKV, PageTable, Selection


def attended_tokens(selection: Selection, row: int, length: int) -> Tensor:
    """The selected tokens of one row as a mask [Hs, length]."""
    token = torch.arange(length)
    spans = selection.spans[row]
    chosen = (token < spans[:, :1]) | (token >= spans[:, 1:])
    for head, count in enumerate(selection.count[row].tolist()):
        units = selection.units[row, head, :count]
        chosen[head] |= torch.isin(token // selection.unit_tokens, units)
    return chosen


def attend(
    query: Tensor,
    kv: PagedKV,
    table: PageTable,
    selection: Selection,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    attended: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See `sparseserve.ops.attend`; `dtype` is that of the arithmetic, and of results that are not given."""
    rows, heads, _ = query.shape
    out = torch.empty_like(query, dtype=dtype) if out is None else out
    lse = query.new_empty((rows, heads), dtype=dtype) if lse is None else lse
    attended = torch.empty_like(selection.count) if attended is None else attended
    for row, length in enumerate(table.seq_lens.tolist()):
        chosen = attended_tokens(selection, row, length)
        attended[row] = chosen.sum(1)
        chosen = chosen.repeat_interleave(heads // chosen.shape[0], 0)  # [Hq, length]
        own = table.pages[..., row, :]
        keys, values = (row_tokens(pool, own, length, kv.places).to(dtype) for pool in (kv.key, kv.value))
        scores = logits(query[row], keys, scale, dtype).masked_fill(~chosen, -torch.inf)
        lse[row] = scores.logsumexp(1)
        weights = (scores - lse[row, :, None]).exp().where(chosen, 0)
        out[row] = _mix(weights, values, chosen)
    return out, lse


def _mix(weights: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Weighted sums [Hq, D] of values [H, T, D]; values of tokens that a head has not chosen count as 0."""
    values = values.repeat_interleave(weights.shape[0] // values.shape[0], 0)
    return (weights[:, None] @ values.where(chosen[..., None], 0))[:, 0]
