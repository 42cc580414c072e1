"""The operations of sparse decode, dispatched to the compiled kernel of the tensors' device.

Shapes use the alphabet of `sparseserve.types`. Every op has a definition in plain torch under the same name in
`sparseserve.reference`. Wrong shapes, dtypes or strides raise RuntimeError with the argument's name; missing kernels
raise KernelsNotBuiltError. Page numbers and unit numbers are trusted.

CPU layout: strides of pages and heads are free; within a page and head K is dense [D, P] (key strides 1, P) and V dense
[P, D] (value strides D, 1). P is a multiple of 32, D a multiple of 16 up to 256.

CUDA layout: strides of pages, heads and tokens are free multiples of 16 bytes, the same for keys and values. bf16 and
fp16; P is a multiple of 16, D is 64, 96, 128 or 256, a group has up to 16 query heads. Lengths, pages and slots are not
checked. Where the blocks of a row must meet, `scratch` is what `step_scratch` gives, kept from step to step.

An op that scores units also selects, in the same launch on CUDA, when a selection is `wanted`: as `select_units` would.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparseserve.ops.library import isa, kernels, use_isa
from sparseserve.types import Bound, Gate, PagedKV, PageTable, Selection, Wanted

__all__ = [
    "attend",
    "compare_outputs",
    "isa",
    "most_chunks",
    "score_gates",
    "score_pages",
    "score_tokens",
    "search_blocks",
    "select_units",
    "step_scratch",
    "summarize_gates",
    "summarize_pages",
    "use_isa",
    "write_tokens",
]

_BOUNDS = {bound: number for number, bound in enumerate(Bound)}


def summarize_pages(key: Tensor, slots: Tensor, summary: Tensor, bound: Bound) -> None:
    """Write the summaries of the units that just-written tokens complete, from the keys of the cache.

    key [M, H, P, D]; slots [T] int64, page * P + offset or -1 for padding; summary [M, H, U, 2, D] of the same dtype,
    dense from U on; units of P / U tokens, a multiple of 16. MIN_MAX writes minimum and maximum, MEAN_STD mean and
    standard deviation, computed in fp32. The arithmetic of a unit has one order, whatever else is summarized.
    """
    kernels(key.device.type)
    torch.ops.sparseserve.summarize_pages(key, slots, summary, _BOUNDS[bound])


def score_pages(
    query: Tensor,
    summary: Tensor,
    table: PageTable,
    unit_tokens: int,
    bound: Bound,
    scores: Tensor | None = None,
    wanted: Wanted | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Score every unit by what its summary says about its keys: q.center + |q|.half, the best of the group.

    query [B, Hq, D]; summary [M, H, U, 2, D] of the same dtype; scores [B, H, >= units] fp32. MIN_MAX: centre and half
    width of the box, Quest (arXiv 2406.10774). MEAN_STD: mean and standard deviation of the keys (arXiv 2605.27740).
    Unscaled. The last unit, complete or not, scores infinity: as in Quest's code it is always taken. Units at or beyond
    the length are left as they are.
    """
    kernels(query.device.type)
    if scores is None:
        shape = query.shape[0], summary.shape[1], table.pages.shape[1] * summary.shape[2]
        scores = query.new_full(shape, -torch.inf, dtype=torch.float32)
    torch.ops.sparseserve.score_pages(
        query,
        summary,
        table.pages,
        table.seq_lens,
        unit_tokens,
        _BOUNDS[bound],
        scores,
        *_parts(wanted),
        scratch if wanted is None else _scratch(scratch, query),
    )
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
    scratch: Tensor | None = None,
) -> Tensor:
    """The attention mass of every unit: sum of exp(scale * q.k - lse) over its tokens and a selection head's queries.

    query [B, Hq, D]; key [M, H, P, D] of the same dtype; lse [B, Hq] fp32, natural log; scores [B, Hs, >= units] fp32.
    unit_tokens is 1, 16, 32 or 64. Units at or beyond the length are left as they are.
    """
    kernels(query.device.type)
    torch.ops.sparseserve.score_tokens(
        query,
        key,
        table.pages,
        table.seq_lens,
        lse,
        scale,
        unit_tokens,
        scores,
        *_parts(wanted),
        scratch if wanted is None else _scratch(scratch, query),
    )
    return scores


def summarize_gates(key: Tensor, slots: Tensor, positions: Tensor, gate: Gate, summary: Tensor) -> None:
    """Write the gate keys of the units that just-written tokens complete, from the keys of the cache.

    key [M, H, P, D]; slots [T] int64, page * P + offset or -1 for padding; positions [T] int64; summary [M, H, U, E]
    fp32, dense from U on; units of P / U tokens, a multiple of 16. Keys are un-rotated at their positions and pooled to
    [max, min, mean]; projection, RMS norm (eps 1e-6) and rotation at the unit's first position follow (SeerAttention-R,
    arXiv 2506.08889). The arithmetic of a unit has one order, whatever else is summarized.
    """
    kernels(key.device.type)
    torch.ops.sparseserve.summarize_gates(
        key, slots, positions, gate.key, gate.key_norm, gate.unrope, gate.rope, summary
    )


def score_gates(
    query: Tensor,
    summary: Tensor,
    table: PageTable,
    unit_tokens: int,
    gate: Gate,
    scores: Tensor | None = None,
    wanted: Wanted | None = None,
) -> Tensor:
    """The logarithm of the share that a gate gives to every complete unit, and infinity for the last unit.

    query [B, Hq, D], rotated at seq_len - 1; summary [M, H, U, E] fp32, gate keys; scores [B, H, >= units] fp32. Logits
    are q.k / sqrt(E); an incomplete last unit takes part in the softmax with a logit of 0 (SeerAttention-R, arXiv
    2506.08889). Units at or beyond the length are left as they are.
    """
    kernels(query.device.type)
    if scores is None:
        shape = query.shape[0], summary.shape[1], table.pages.shape[1] * summary.shape[2]
        scores = query.new_full(shape, -torch.inf, dtype=torch.float32)
    weights = gate.query, gate.query_norm, gate.unrope, gate.rope
    torch.ops.sparseserve.score_gates(
        query, summary, table.pages, table.seq_lens, unit_tokens, *weights, scores, *_parts(wanted)
    )
    return scores


def select_units(scores: Tensor, seq_lens: Tensor, wanted: Wanted) -> None:
    """Fill the selection that is `wanted` by scores [B, Hs, >= units] fp32 of the units; seq_lens [B] int32.

    Ties go to the lower unit, NaN is the lowest score.
    """
    kernels(scores.device.type)
    torch.ops.sparseserve.select_units(scores, seq_lens, wanted.selection.unit_tokens, *_parts(wanted))


def search_blocks(
    query: Tensor,
    key: Tensor,
    table: PageTable,
    state: Tensor,
    *,
    chunk_tokens: Sequence[int],
    stage_tokens: Sequence[int],
    refresh_steps: Sequence[int],
    wanted: Wanted,
    scores: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Fill the selection that is `wanted` with the units that a search in three stages finds, reading few keys.

    query [B, Hq, D]; key [M, H, P, D] of the same dtype. The selection is in units of the last chunk, the sink a
    multiple of it; what counts is the budget, not a threshold. On CUDA `scores` [B, Hs, >= most_chunks] fp32 is room
    for the scores of a stage.

    A stage scores its chunks of chunk_tokens[i] tokens and keeps stage_tokens[i] tokens of the best, the last stage
    what the budget allows; ties go to the lower chunk. What is kept is split into the chunks of the next stage. The
    first chunks begin at the sink; the last one starts no later than max(recent - chunk_tokens[0], 0) tokens before the
    current token. The score of a chunk is the largest q.k, in fp32 and over the query heads of a selection head, met by
    a midpoint search (InfiniteHiP, arXiv 2502.08910): halve the chunk, probe the middle of both halves, go on in the
    half whose probe is larger, in the right one of equal halves.

    state [M, Hs, >= 4 + C1 + C2 + S] int32, Ci = stage_tokens[i] // chunk_tokens[i], remembers in the row's last page
    the length at which the row was searched (0: never), the number of chunks that each stage kept, and their first
    tokens. A step searches all stages, unless an earlier token of the page has been searched; then it begins with the
    first stage i whose refresh_steps[i] divides the offset of the current token in its page, or only reuses the units.
    """
    kernels(query.device.type)
    selection = wanted.selection
    if query.is_cuda and scores is None:
        chunks = most_chunks(table.pages.shape[1] * key.shape[2], chunk_tokens, stage_tokens)
        scores = query.new_empty((*selection.count.shape, chunks), dtype=torch.float32)
    torch.ops.sparseserve.search_blocks(
        query,
        key,
        table.pages,
        table.seq_lens,
        state,
        chunk_tokens,
        stage_tokens,
        refresh_steps,
        wanted.sink,
        wanted.recent,
        wanted.budget,
        wanted.row_budget,
        selection.spans,
        selection.units,
        selection.count,
        scores,
        _scratch(scratch, query),
    )


def most_chunks(max_len: int, chunk_tokens: Sequence[int], stage_tokens: Sequence[int]) -> int:
    """The most chunks that a stage of `search_blocks` scores in rows of up to `max_len` tokens."""
    split = (
        tokens // chunk * (chunk // part)
        for tokens, (chunk, part) in zip(stage_tokens, pairwise(chunk_tokens), strict=True)
    )
    return max(-(-max_len // chunk_tokens[0]), *split)


def write_tokens(key: Tensor, value: Tensor, slots: Tensor, kv: PagedKV) -> None:
    """Write the keys and values of new tokens to the pages of their heads.

    key, value [T, H, D] of the cache's dtype; slots [R, >= T] int64, of every table: page * P + offset, or -1 for
    tokens that are not kept; `kv` with the places [H, 2] of its heads.
    """
    assert kv.places is not None
    kernels(key.device.type)
    torch.ops.sparseserve.write_tokens(key, value, slots, kv.key, kv.value, kv.places)


def attend(
    query: Tensor,
    kv: PagedKV,
    table: PageTable,
    selection: Selection,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    attended: Tensor | None = None,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a selection, every token once; returns (out, lse).

    query, out [B, Hq, D] of the cache's dtype; lse [B, Hq] fp32, natural log; attended [B, Hs] int32, the number of
    tokens in the union. A row without tokens gives out 0 and lse -inf. What lies outside the selection has no
    influence, and a row's result does not depend on the other rows.

    With `kv.places` the table's pages are [R, B, N], and KV head h lies in slot places[h, 1] of the pages of table
    places[h, 0]. The strides of R and B are free, 0 where rows share a table. One selection of all heads (Hs = 1) needs
    them all in one table. Pages without a selected token are not looked up, save a row's first on CUDA, which must be
    one of the pool.
    """
    kernels(query.device.type)
    rows, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = query.new_empty((rows, heads), dtype=torch.float32) if lse is None else lse
    attended = torch.empty_like(selection.count) if attended is None else attended
    torch.ops.sparseserve.attend(
        query,
        kv.key,
        kv.value,
        table.pages,
        table.seq_lens,
        selection.spans,
        selection.units,
        selection.count,
        selection.unit_tokens,
        scale,
        out,
        lse,
        attended,
        kv.places,
        _scratch(scratch, query),
    )
    return out, lse


def compare_outputs(
    out: Tensor,
    lse: Tensor,
    dense_out: Tensor,
    dense_lse: Tensor,
    recall: Tensor,
    error: Tensor,
    floor: float = 0,
) -> None:
    """Write what attention over a selection loses against dense attention, means over the query heads of a row.

    out, dense_out [B, Hq, D] of one dtype, strides of rows and heads free; lse, dense_lse [B, Hq] fp32, natural log.
    recall [B] fp32 is exp(lse - dense_lse), the softmax mass that the selection keeps; error [B] fp32 is
    |out - dense_out| / |dense_out|, and 0 where nothing differs. A row in which dense attention of a head took nothing,
    dense_lse -inf, gives NaN in both. A row's result does not depend on the other rows.

    A row whose recall is less than `floor` takes dense_out in place of its out.
    """
    kernels(out.device.type)
    torch.ops.sparseserve.compare_outputs(out, lse, dense_out, dense_lse, recall, error, floor)


def step_scratch(rows: int, heads: int, head_dim: int, device: torch.device) -> Tensor:
    """The fp32 memory in which the blocks of up to `rows` rows of `heads` query heads meet on CUDA.

    Zero at first; every call leaves it ready for the next.
    """
    counters, splits = 3, 32  # kCounterWords and kMaxSplits in kernels/include/sparseserve/params.h
    return torch.zeros(rows * heads * (counters + splits * (head_dim + 2)), device=device)


def _scratch(given: Tensor | None, query: Tensor) -> Tensor | None:
    rows, heads, dim = query.shape
    return step_scratch(rows, heads, dim, query.device) if query.is_cuda and given is None else given


def _parts(wanted: Wanted | None) -> tuple[Tensor | float | None, ...]:
    """What the ops get of a selection to be filled."""
    if wanted is None:
        return (None,) * 8
    selection = wanted.selection
    limits = wanted.sink, wanted.recent, wanted.budget, wanted.threshold, wanted.row_budget
    return *limits, selection.spans, selection.units, selection.count
