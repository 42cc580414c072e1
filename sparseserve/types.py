"""The few types that travel between policies, ops and the vLLM plugin.

Shape alphabet of the whole project: B decode rows, H KV heads, G query heads per KV head, Hq = H * G query heads,
Hs selection heads (1, H or Hq), D head dim, N pages of a row, P page size, S unit slots, U units per page,
M physical pages, L layers. A *unit* is `unit_tokens` consecutive tokens; `unit_tokens` divides P.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Role(Enum):
    """What a layer does in a decode step."""

    DENSE = "dense"  # attends to everything
    SELECT = "select"  # chooses the selection
    REUSE = "reuse"  # attends to the selection of the latest SELECT layer
    WINDOW = "window"  # attends to spans that depend on the length alone


class Scope(Enum):
    """Which heads share one selection."""

    ALL_HEADS = "all_heads"
    KV_HEAD = "kv_head"
    QUERY_HEAD = "query_head"


class Bound(Enum):
    """How the summary of a unit bounds its keys."""

    MIN_MAX = "min_max"  # smallest and largest key, per dim
    MEAN_STD = "mean_std"  # sum and sum of squares, per dim


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The attention heads of one layer on one rank."""

    kv_heads: int  # H
    group: int  # G
    head_dim: int  # D

    @property
    def query_heads(self) -> int:
        """Hq = H * G."""
        return self.kv_heads * self.group

    def selection_heads(self, scope: Scope) -> int:
        """Hs of a scope: 1, H or Hq."""
        return {Scope.ALL_HEADS: 1, Scope.KV_HEAD: self.kv_heads, Scope.QUERY_HEAD: self.query_heads}[scope]


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Views of a page pool; strides are free, the CPU kernels want K transposed in its page and V rows contiguous."""

    key: Tensor  # [M, H, P, D] bf16, fp16 or fp32
    value: Tensor  # [M, H, P, D] same dtype

    @property
    def page_size(self) -> int:
        """P, in tokens."""
        return self.key.shape[2]


@dataclass(frozen=True, slots=True)
class PageTable:
    """The paged cache as this step sees it, one row per decoding request."""

    pages: Tensor  # [B, N] int32, physical page of each logical page
    seq_lens: Tensor  # [B] int32, tokens with the one being decoded; 0 marks a padding row


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens that every row and selection head attends to: the union of two spans and a list of units."""

    spans: Tensor  # [B, Hs, 2] int32: tokens [0, spans[0]) and [spans[1], seq_len)
    units: Tensor  # [B, Hs, S] int32, ascending and unique in the first `count`
    count: Tensor  # [B, Hs] int32
    unit_tokens: int

    @classmethod
    def empty(cls, rows: int, heads: int, slots: int, unit_tokens: int) -> Selection:
        """Buffers for `rows` x `heads` selections of at most `slots` units."""
        return cls(
            spans=torch.zeros(rows, heads, 2, dtype=torch.int32),
            units=torch.zeros(rows, heads, slots, dtype=torch.int32),
            count=torch.zeros(rows, heads, dtype=torch.int32),
            unit_tokens=unit_tokens,
        )

    def rows(self, rows: int) -> Selection:
        """The first `rows` rows, as views."""
        return Selection(self.spans[:rows], self.units[:rows], self.count[:rows], self.unit_tokens)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Everything about one layer that is known before serving."""

    layer: int
    role: Role
    dense_output: bool = False  # attends to everything; a SELECT layer then chooses for the layers after it
    sink: Tensor | None = None  # [Hs] int32 tokens, SELECT layers
    recent: Tensor | None = None  # [Hs] int32 tokens, SELECT layers
    budget: Tensor | None = None  # [Hs] int32 tokens with sink and recent, SELECT layers


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: views of buffers that are allocated once, cut to its B rows."""

    table: PageTable
    everything: Selection  # Hs = 1, spans of the whole row
    selection: Selection
    scores: Tensor  # [B, Hs, T] fp32 scratch of the selection layers
    lse: Tensor  # [B, Hq] fp32, of the latest attend
    attended_dense: Tensor  # [L, B, 1] int32, tokens attended by layers with dense output
    attended: Tensor  # [L, B, Hs] int32, tokens attended by the other layers
