"""Inputs for tests of the ops: page pools as vLLM's CPU backend lays them out, with everything unused poisoned."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparseserve.testing import target
from sparseserve.types import HeadShape, PagedKV, PageTable, Selection

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
PAGE_SIZES = (32, 64, 96, 128)
UNITS = (1, 16, 32, 64)
# Of torch.library.opcheck: the ops have no gradient, and tracing them costs seconds.
OPCHECKS = ("test_schema", "test_faketensor")


@dataclass(frozen=True, slots=True)
class Case:
    """One decode step over a page pool."""

    query: Tensor  # [B, Hq, D]
    kv: PagedKV
    pages: Tensor  # [B, N] int32; [R, B, N] with places
    seq_lens: Tensor  # [B] int32
    shape: HeadShape

    @property
    def table(self) -> PageTable:
        """The pages and lengths as the ops take them."""
        return PageTable(self.pages, self.seq_lens)

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.shape.head_dim)

    @property
    def capacity(self) -> int:
        """The most tokens that a row can hold, N * P."""
        return self.pages.shape[-1] * self.kv.page_size

    def slots(self, row: int) -> tuple[Tensor, Tensor]:
        """Slots and positions of the tokens of a row."""
        token = torch.arange(int(self.seq_lens[row]))
        page = self.pages[row].long()[token // self.kv.page_size]
        return page * self.kv.page_size + token % self.kv.page_size, token


def paged_kv(
    lengths: Sequence[int],
    shape: HeadShape,
    page_size: int,
    dtype: torch.dtype,
    seed: int = 0,
    page_order: int = 0,
    poison: float = torch.nan,
) -> Case:
    """Random rows of `lengths` tokens in a shuffled pool whose pages are wider than they need to be.

    `poison` fills all memory that holds no token of a row. Tokens and queries depend on `seed` and their position in
    the batch, physical pages on `page_order`. Head size and dtype are fitted to the kernels under test.
    """
    shape, dtype = target.fitting(shape, dtype)
    generator = torch.Generator().manual_seed(seed)
    rows, dim = len(lengths), shape.head_dim
    per_row = max(1, -(-max(lengths) // page_size))
    pool = rows * per_row + 2
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(page_order))
    pages = order[: rows * per_row].view(rows, per_row)
    page = shape.kv_heads * page_size * 2 * dim
    memory = torch.full((pool, page + 64), poison, dtype=dtype)  # 64: a tail, as summaries in the page leave it
    kv = target.views(target.cache(memory, shape, page_size))
    for row, length in enumerate(lengths):
        token = torch.arange(length)
        at = pages[row, token // page_size], slice(None), token % page_size
        for half in (kv.key, kv.value):
            half[at] = torch.randn(length, shape.kv_heads, dim, generator=generator).to(dtype)
    query = torch.randn(rows, shape.query_heads, dim, generator=generator).to(dtype) * 2
    return Case(query, kv, pages.int(), torch.tensor(lengths, dtype=torch.int32), shape)


def scattered(case: Case, tables: int, slots: int, seed: int = 0, poison: float = torch.nan) -> Case:
    """The case with every KV head in a table and slot of its own choice; `poison` fills all other slots and pages."""
    heads, page_size, dim = case.shape.kv_heads, case.kv.page_size, case.shape.head_dim
    place = torch.tensor(random.Random(seed).sample(range(tables * slots), heads))
    places = torch.stack([place // slots, place % slots], 1)
    pool = tables * case.pages.numel() + 1
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))
    pages = order[1:].view(tables, *case.pages.shape)
    memory = torch.full((pool, slots * page_size * 2 * dim + 64), poison, dtype=case.query.dtype)
    kv = target.views(target.cache(memory, HeadShape(slots, 1, dim), page_size))
    for head, (table, slot) in enumerate(places.tolist()):
        for half, whole in ((kv.key, case.kv.key), (kv.value, case.kv.value)):
            half[pages[table], slot] = whole[case.pages.long(), head]
    return replace(case, kv=replace(kv, places=places.int()), pages=pages.int())


def random_selection(case: Case, heads: int, unit_tokens: int, seed: int = 0) -> Selection:
    """Spans and units drawn freely: they overlap, miss, or cover a row; every head has its own."""
    draw = random.Random(seed)
    rows, slots = len(case.seq_lens), max(1, case.capacity // unit_tokens // 2)
    selection = Selection.empty(rows, heads, slots, unit_tokens)
    for row, length in enumerate(case.seq_lens.tolist()):
        for head in range(heads):
            units = -(-length // unit_tokens)
            chosen = sorted(draw.sample(range(units), draw.randint(0, min(units, slots))))
            selection.units[row, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            selection.count[row, head] = len(chosen)
            spans = [draw.randint(0, length // 4), length - draw.randint(min(length, 1), max(1, length // 4))]
            selection.spans[row, head] = torch.tensor(spans)
    return selection


def sample_grid(count: int, seed: int = 0, **axes: Sequence[Any]) -> list[dict[str, Any]]:
    """`count` points of the product of `axes`; every value of an axis occurs as often as the others."""
    draw = random.Random(seed)
    columns = {}
    for name, values in axes.items():
        column = [values[i % len(values)] for i in range(count)]
        draw.shuffle(column)
        columns[name] = column
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]
