"""Rows of a page pool as plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def row_tokens(pool: Tensor, pages: Tensor, length: int, places: Tensor | None = None) -> Tensor:
    """The first `length` tokens of one row: pool [M, H, P, D], pages [N] int32 -> [H, length, D].

    With the places [H, 2] of a PagedKV: pool [M, slots, P, D], pages [R, N].
    """
    if places is not None:
        return torch.cat([row_tokens(pool[:, slot, None], pages[table], length) for table, slot in places.tolist()])
    page_size = pool.shape[2]
    used = pages[: -(-length // page_size)].long()
    return pool[used].transpose(0, 1).flatten(1, 2)[:, :length]


def row_units(summary: Tensor, pages: Tensor, units: int) -> Tensor:
    """The first `units` units of one row: summary [M, H, U, ...], pages [N] int32 -> [H, units, ...]."""
    used = pages[: -(-units // summary.shape[2])].long()
    return summary[used].transpose(0, 1).flatten(1, 2)[:, :units]


def logits(query: Tensor, keys: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * q.k: query [Hq, D], keys [H, T, D] -> [Hq, T]; query head h reads KV head h // G."""
    grouped = query.to(dtype).reshape(keys.shape[0], -1, query.shape[1])  # [H, G, D]
    return (grouped @ keys.to(dtype).transpose(1, 2)).flatten(0, 1) * scale
