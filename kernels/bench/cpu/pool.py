"""Decoding requests whose caches together exceed the last-level cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.decode.views import cpu_views
from sparseserve.types import HeadShape, PagedKV, PageTable

PAGE, UNIT, KV_HEADS = 128, 32, 4
POOL_BYTES = 256 << 20
DTYPE = torch.bfloat16


class Requests:
    """Equally long requests in one page pool; request i is the row [i] of pages and one of several selections."""

    def __init__(self, context: int, shape: HeadShape) -> None:
        self.context, self.shape = context, shape
        per_row = context // PAGE
        page_bytes = KV_HEADS * PAGE * shape.head_dim * 4
        self.count = max(2, POOL_BYTES // (per_row * page_bytes))
        self.cache = torch.randn(self.count * per_row, KV_HEADS, PAGE, 2 * shape.head_dim, dtype=DTYPE)
        self.kv: PagedKV = cpu_views(self.cache)
        self.pages = torch.randperm(self.count * per_row).view(self.count, per_row).int()
        self.seq_lens = torch.tensor([context], dtype=torch.int32)
        self.query = torch.randn(1, shape.query_heads, shape.head_dim).to(DTYPE)
        self.scale = shape.head_dim**-0.5

    def row(self, i: int) -> Tensor:
        return self.pages[i % self.count : i % self.count + 1]

    def table(self, i: int) -> PageTable:
        return PageTable(self.row(i), self.seq_lens)

    def slots(self, i: int) -> Tensor:
        """Slots of all tokens of request i, in order."""
        return (self.row(i)[0].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def tile_starts(self, i: int, tiles: Tensor, head: int) -> Tensor:
        """Byte offsets of the K columns of 32-token `tiles` of request i."""
        page = self.row(i)[0].long()[tiles * UNIT // PAGE]
        strides = self.cache.stride()
        return 2 * (page * strides[0] + head * strides[1] + tiles * UNIT % PAGE)

    def value_starts(self, i: int, tiles: Tensor, head: int) -> Tensor:
        page = self.row(i)[0].long()[tiles * UNIT // PAGE]
        strides = self.cache.stride()
        dim = self.shape.head_dim
        return 2 * (page * strides[0] + head * strides[1] + PAGE * dim + tiles * UNIT % PAGE * dim)
