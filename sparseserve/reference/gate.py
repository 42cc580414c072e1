"""Learned gates over blocks of keys (SeerAttention-R, arXiv 2506.08889)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.reference.paging import row_units
from sparseserve.reference.select import select_units
from sparseserve.types import Gate, PageTable, Wanted

EPSILON = 1e-6  # of the gate's RMS norms


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x [..., D] turned by cos and sin [..., D], halves against halves."""
    cos, sin = rope.to(x.dtype).chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def unrotate(x: Tensor, unrope: Tensor) -> Tensor:
    """x [..., D] turned back."""
    cos, sin = unrope.chunk(2, -1)
    return rotate(x, torch.cat([cos, -sin], -1))


def pool(keys: Tensor) -> Tensor:
    """Keys [..., T, D] -> [..., 3D]: maximum, minimum and mean, in this order."""
    return torch.cat([keys.amax(-2), keys.amin(-2), keys.mean(-2)], -1)


def summarize_gates(
    key: Tensor,
    slots: Tensor,
    positions: Tensor,
    gate: Gate,
    summary: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """See `sparseserve.ops.summarize_gates`; `dtype` is that of the arithmetic."""
    page_size = key.shape[2]
    unit_tokens = page_size // summary.shape[2]
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        if slot < 0 or (slot + 1) % unit_tokens:
            continue
        page, last = divmod(slot, page_size)
        start = position + 1 - unit_tokens
        keys = key[page, :, last + 1 - unit_tokens : last + 1].to(dtype)  # [H, unit_tokens, D]
        pooled = pool(unrotate(keys, gate.unrope[start : position + 1]))
        projected = torch.einsum("hd,hde->he", pooled, gate.key.to(dtype))
        summary[page, :, last // unit_tokens] = _finish(projected, gate.key_norm, gate.rope, start)


def score_gates(
    query: Tensor,
    summary: Tensor,
    table: PageTable,
    unit_tokens: int,
    gate: Gate,
    scores: Tensor | None = None,
    wanted: Wanted | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `sparseserve.ops.score_gates`; `dtype` is that of the arithmetic."""
    if scores is None:
        shape = query.shape[0], summary.shape[1], table.pages.shape[1] * summary.shape[2]
        scores = query.new_full(shape, -torch.inf, dtype=dtype)
    for row, length in enumerate(table.seq_lens.tolist()):
        if length == 0:
            continue
        units, last = length // unit_tokens, (length - 1) // unit_tokens
        plain = unrotate(query[row].to(dtype), gate.unrope[length - 1]).view(gate.query.shape[:3])
        projected = torch.einsum("hgd,hgde->he", plain, gate.query.to(dtype))
        gate_query = _finish(projected, gate.query_norm, gate.rope, length - 1)
        keys = row_units(summary, table.pages[row], units).to(dtype)  # [H, units, E]
        logits = torch.einsum("he,hue->hu", gate_query, keys) / gate_query.shape[1] ** 0.5
        incomplete = logits.new_zeros(len(logits), last + 1 - units)
        scores[row, :, : last + 1] = torch.cat([logits, incomplete], 1).log_softmax(1)
        scores[row, :, last] = torch.inf
    if wanted is not None:
        select_units(scores, table.seq_lens, wanted)
    return scores


def _finish(x: Tensor, norm: Tensor | None, rope: Tensor | None, position: int) -> Tensor:
    """RMS norm and rotation of x [H, E]."""
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * norm
    return x if rope is None else rotate(x, rope[position])
