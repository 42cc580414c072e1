"""The five operations of sparse decode, dispatched to the compiled kernel of the tensors' device.

Shapes use the alphabet of `sparseserve.types`. Every op has a definition in plain torch under the same name in
`sparseserve.reference`. Wrong shapes, dtypes or strides raise RuntimeError with the argument's name; missing kernels
raise KernelsNotBuiltError. Page numbers and unit numbers are trusted.

CPU layout: strides of pages and heads are free; within a page and head K is dense [D, P] (key strides 1, P) and V dense
[P, D] (value strides D, 1). P is a multiple of 32, D a multiple of 16 up to 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.ops.library import isa, kernels, use_isa
from sparseserve.types import Bound, PagedKV, Selection

__all__ = ["attend", "isa", "score_pages", "score_tokens", "select_units", "summarize_pages", "use_isa"]

_BOUNDS = {bound: number for number, bound in enumerate(Bound)}


def summarize_pages(key: Tensor, slots: Tensor, summary: Tensor, unit_tokens: int, bound: Bound) -> None:
    """Fold just-written keys into the summaries of their units.

    key [T, H, D]; slots [T] int64, page * P + offset or -1 for padding, ascending within a unit; summary
    [M, H, U, 2, D] fp32, dense from U on. MIN_MAX keeps minimum and maximum, MEAN_STD sum and sum of squares, token by
    token in fp32. A token at offset 0 of a unit starts the unit afresh.
    """
    kernels()
    torch.ops.sparseserve.summarize_pages(key, slots, summary, unit_tokens, _BOUNDS[bound])


def score_pages(
    query: Tensor,
    summary: Tensor,
    pages: Tensor,
    seq_lens: Tensor,
    unit_tokens: int,
    bound: Bound,
    scores: Tensor | None = None,
) -> Tensor:
    """Score every unit by what its summary says about its keys: q.center + |q|.half, the best of the group.

    query [B, Hq, D]; summary [M, H, U, 2, D] fp32; pages [B, N] int32; seq_lens [B] int32; scores [B, H, >= units]
    fp32. MIN_MAX: centre and half width of the box, Quest (arXiv 2406.10774). MEAN_STD: mean and standard deviation of
    the keys (arXiv 2605.27740). Unscaled. Units at or beyond the length are left as they are.
    """
    kernels()
    if scores is None:
        shape = query.shape[0], summary.shape[1], pages.shape[1] * summary.shape[2]
        scores = query.new_full(shape, -torch.inf, dtype=torch.float32)
    torch.ops.sparseserve.score_pages(query, summary, pages, seq_lens, unit_tokens, _BOUNDS[bound], scores)
    return scores


def score_tokens(
    query: Tensor,
    key: Tensor,
    pages: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    scale: float,
    scores: Tensor,
    unit_tokens: int,
) -> Tensor:
    """The attention mass of every unit: sum of exp(scale * q.k - lse) over its tokens and a selection head's queries.

    query [B, Hq, D]; key [M, H, P, D] of the same dtype; pages [B, N] int32; seq_lens [B] int32; lse [B, Hq] fp32,
    natural log; scores [B, Hs, >= units] fp32. unit_tokens is 1, 16, 32 or 64. Units at or beyond the length are left
    as they are.
    """
    kernels()
    torch.ops.sparseserve.score_tokens(query, key, pages, seq_lens, lse, scale, unit_tokens, scores)
    return scores


def select_units(
    scores: Tensor, seq_lens: Tensor, sink: Tensor, recent: Tensor, budget: Tensor, selection: Selection
) -> None:
    """Fill `selection` with sink, recent tokens and the best units that the budget still allows.

    scores [B, Hs, >= units] fp32; seq_lens [B] int32; sink, recent, budget [Hs] int32 tokens, sink + recent <= budget,
    recent >= 1. Rows within the budget are selected whole, without units. Ties go to the lower unit, NaN is the lowest
    score.
    """
    kernels()
    torch.ops.sparseserve.select_units(
        scores, seq_lens, sink, recent, budget, selection.unit_tokens, selection.spans, selection.units, selection.count
    )


def attend(
    query: Tensor,
    kv: PagedKV,
    pages: Tensor,
    seq_lens: Tensor,
    selection: Selection,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    attended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a selection, every token once; returns (out, lse).

    query, out [B, Hq, D] of the cache's dtype; pages [B, N] int32; seq_lens [B] int32; lse [B, Hq] fp32, natural log;
    attended [B, Hs] int32, the number of tokens in the union. A row without tokens gives out 0 and lse -inf. What lies
    outside the selection has no influence, and a row's result does not depend on the other rows.
    """
    kernels()
    rows, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = query.new_empty((rows, heads), dtype=torch.float32) if lse is None else lse
    attended = torch.empty_like(selection.count) if attended is None else attended
    torch.ops.sparseserve.attend(
        query,
        kv.key,
        kv.value,
        pages,
        seq_lens,
        selection.spans,
        selection.units,
        selection.count,
        selection.unit_tokens,
        scale,
        out,
        lse,
        attended,
    )
    return out, lse
