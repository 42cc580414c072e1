"""HiP's search for units, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseserve.reference.paging import logits, row_tokens
from sparseserve.types import PageTable, Wanted


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
    dtype: torch.dtype = torch.float32,
) -> None:
    """See `sparseserve.ops.search_blocks`; `dtype` is that of the arithmetic."""
    selection = wanted.selection
    limits = torch.stack([wanted.sink, wanted.recent, wanted.budget], 1).tolist()
    page_size, heads, slots = key.shape[2], selection.units.shape[1], selection.units.shape[2]
    for row, length in enumerate(table.seq_lens.tolist()):
        dots = logits(query[row], row_tokens(key, table.pages[row], length), 1.0, dtype)  # [Hq, T]
        for head, (first, last, most) in enumerate(limits):
            if wanted.takes_all(row, length, most):
                selection.spans[row, head] = length
                selection.count[row, head] = 0
                continue
            keep = [tokens // chunk for tokens, chunk in zip(stage_tokens, chunk_tokens, strict=False)]
            keep.append(min(max(0, wanted.budget_of(row, most) - first - last) // chunk_tokens[-1], slots))
            limit = length - max(0, last - chunk_tokens[0])  # chunks start before it
            memory = state[table.pages[row, (length - 1) // page_size], head]
            kept = torch.split(memory[4 : 4 + sum(keep)], keep)  # first tokens
            for stage in range(_first_stage(int(memory[0]), length, page_size, refresh_steps), len(chunk_tokens)):
                chunk = chunk_tokens[stage]
                if stage == 0:
                    starts = torch.arange(first, max(first, limit), chunk)
                else:
                    parents = kept[stage - 1][: memory[stage], None]
                    starts = (parents + torch.arange(0, chunk_tokens[stage - 1], chunk)).flatten()
                starts = starts[starts < limit]
                scores = chunk_scores(dots.chunk(heads)[head], starts, chunk)
                best = starts[scores.sort(descending=True, stable=True).indices[: keep[stage]]].sort().values
                kept[stage][: len(best)] = best
                memory[0], memory[1 + stage] = length, len(best)
            count = int(memory[3])
            start = min(first, length)
            selection.spans[row, head] = torch.tensor([start, max(length - last, start)])
            selection.units[row, head, :count] = kept[-1][:count] // chunk_tokens[-1]
            selection.count[row, head] = count


def _first_stage(searched_at: int, length: int, page_size: int, refresh_steps: Sequence[int]) -> int:
    """The first stage to search again; len(refresh_steps) when the units are reused."""
    offset = (length - 1) % page_size
    if not length - offset <= searched_at < length:  # not on an earlier token of this page
        return 0
    due = (stage for stage, steps in enumerate(refresh_steps) if offset % steps == 0)
    return next(due, len(refresh_steps))


def chunk_scores(dots: Tensor, starts: Tensor, chunk: int) -> Tensor:
    """Scores [n] of the chunks that begin at starts [n], from q.k of all tokens, dots [heads, T]."""
    left = starts.long().expand(len(dots), -1)
    right = (left + chunk).clamp(max=dots.shape[1])
    best = dots.new_full(left.shape, -torch.inf)
    for _ in range(chunk.bit_length()):  # down to a single token
        middle = (left + right) // 2
        low, high = dots.gather(1, (left + middle) // 2), dots.gather(1, (middle + right) // 2)
        for probe in (low, high):
            best = torch.where(probe > best, probe, best)
        go_right = high >= low
        left, right = torch.where(go_right, middle, left), torch.where(go_right, right, middle)
    return best.amax(0)
