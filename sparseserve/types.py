"""The few types that travel between policies, ops and the vLLM plugin.

Shape alphabet of the whole project: B decode rows, H KV heads, G query heads per KV head, Hq = H * G query heads,
Hs selection heads (1, H or Hq), D head dim, N pages of a row, P page size, S slots of a page, U units per page, K units
that a selection has room for, M physical pages, L layers. A *unit* is `unit_tokens` consecutive tokens; `unit_tokens`
divides P.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

CPU = torch.device("cpu")
POLICY_BUDGET = 0  # in a row's budget: the plan's, not one of its own


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
    MEAN_STD = "mean_std"  # mean and standard deviation, per dim


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The attention heads of one layer on one rank."""

    kv_heads: int  # H
    queries_per_kv: int  # G
    head_dim: int  # D

    @property
    def query_heads(self) -> int:
        """Hq = H * G."""
        return self.kv_heads * self.queries_per_kv

    def selection_heads(self, scope: Scope) -> int:
        """Hs of a scope: 1, H or Hq."""
        return {Scope.ALL_HEADS: 1, Scope.KV_HEAD: self.kv_heads, Scope.QUERY_HEAD: self.query_heads}[scope]


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Views of a page pool; strides are free, within what the kernels of the device take.

    A page has a slot for each KV head of the layer. With `places` it has any number of slots, and every KV head names
    one, and one of several page tables, so that heads may keep different tokens. Only `attend` takes places.
    """

    key: Tensor  # [M, H, P, D] bf16, fp16 or fp32; [M, slots, P, D] with places
    value: Tensor  # as key
    places: Tensor | None = None  # [H, 2] int32, table and slot of every KV head; None: one table, head h in slot h

    @property
    def page_size(self) -> int:
        """P, in tokens."""
        return self.key.shape[2]


@dataclass(frozen=True, slots=True)
class PageTable:
    """The paged cache as this step sees it, one row per decoding request."""

    pages: Tensor  # [B, N] int32, physical page of each logical page; with places [R, B, N], R tables
    seq_lens: Tensor  # [B] int32, tokens with the one being decoded; 0 marks a padding row


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens that every row and selection head attends to: the union of two spans and a list of units."""

    spans: Tensor  # [B, Hs, 2] int32: tokens [0, spans[0]) and [spans[1], seq_len)
    units: Tensor  # [B, Hs, K] int32, ascending and unique in the first `count`
    count: Tensor  # [B, Hs] int32
    unit_tokens: int

    @classmethod
    def empty(cls, rows: int, heads: int, units: int, unit_tokens: int, device: torch.device = CPU) -> Selection:
        """Buffers for `rows` x `heads` selections of at most `units` units."""
        return cls(
            spans=torch.zeros(rows, heads, 2, dtype=torch.int32, device=device),
            units=torch.zeros(rows, heads, units, dtype=torch.int32, device=device),
            count=torch.zeros(rows, heads, dtype=torch.int32, device=device),
            unit_tokens=unit_tokens,
        )

    def rows(self, rows: int) -> Selection:
        """The first `rows` rows, as views."""
        return Selection(self.spans[:rows], self.units[:rows], self.count[:rows], self.unit_tokens)


@dataclass(frozen=True, slots=True)
class Budgets:
    """The budgets in tokens that a policy's requests may have."""

    default: int  # the policy's own
    least: int
    largest: int

    def wider(self, budget_tokens: int | None) -> int | None:
        """The next larger budget of a request; None where there is none."""
        now = self.default if budget_tokens is None else budget_tokens
        return min(2 * now, self.largest) if now < self.largest else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A selection to be filled: sink, recent tokens, and the best units that the budget still allows.

    Rows within the budget are selected whole, without units. With a threshold, the units that score above it are
    selected instead, whatever the budget; there must be room for all units then.

    A row may have a budget of its own. Sink and recent tokens are taken even when they exceed it, and a row within it
    is selected whole under a threshold, too.
    """

    selection: Selection
    sink: Tensor  # [Hs] int32 tokens; sink + recent <= budget
    recent: Tensor  # [Hs] int32 tokens
    budget: Tensor  # [Hs] int32 tokens
    threshold: float | None = None
    row_budget: Tensor | None = None  # [B] int32 tokens: a row's own budget, or POLICY_BUDGET

    def budget_of(self, row: int, budget: int) -> int:
        """The budget of a row in tokens, where the plan's is `budget`."""
        own = POLICY_BUDGET if self.row_budget is None else int(self.row_budget[row])
        return own if own > POLICY_BUDGET else budget

    def takes_all(self, row: int, length: int, budget: int) -> bool:
        """Whether a row of `length` tokens is selected whole, where the plan's budget is `budget`."""
        return length <= self.budget_of(row, budget if self.threshold is None else -1)


N = TypeVar("N", float, Tensor)


def window_start(length: N, alpha: N, beta: N, minimum: N) -> N:
    """The first of a row's last max(floor(alpha + beta * length), minimum) tokens, from 0; for numbers and tensors."""
    kept = (alpha + beta * length) // 1
    start = length - kept - (minimum - kept) * (minimum > kept)
    return start * (start > 0)


@dataclass(frozen=True, slots=True)
class Window:
    """The first `sink` tokens and the last ones, at a length of N tokens max(alpha + beta * N, minimum) in all.

    A selection head with several lines alpha + beta * N takes the longest at the length of the row. The start of the
    last tokens is rounded down to a multiple of `align`, not their number up: with beta <= 1 the start never moves back
    as N grows, so what fell out of the window is never needed again.
    """

    sink: Tensor  # [Hs] int32 tokens
    alpha: Tensor  # [Hs, lines] fp64 tokens
    beta: Tensor  # [Hs, lines] fp64
    minimum: int = 0  # tokens
    align: int = 1  # tokens

    def spans(self, seq_lens: Tensor) -> Tensor:
        """The spans [..., Hs, 2] int32 of a Selection for seq_lens [...]; the window's tensors may have more dims."""
        lengths, sink = seq_lens[..., None, None].to(torch.float64), self.sink[..., None]
        starts = window_start(lengths, self.alpha - sink, self.beta, self.minimum - sink)  # of every line
        start = starts.amin(-1).to(torch.int32) // self.align * self.align
        sink = torch.minimum(self.sink, seq_lens[..., None])
        return torch.stack([sink, start], -1).to(torch.int32)

    def at(self, length: int) -> tuple[Tensor, Tensor]:
        """End of the first and start of the last tokens in a row of `length` tokens, [Hs] int32 each."""
        sink, start = self.spans(torch.tensor(length, dtype=torch.int32, device=self.sink.device)).unbind(-1)
        return sink, start

    def in_pages(self, page_size: int, max_len: int) -> Window:
        """The window of heads that store whole pages: all tokens, where up to `max_len` none of its pages is free."""
        sink, start = self.at(max_len)
        frees = (start // page_size > -(-sink // page_size))[:, None]
        return replace(self, alpha=torch.where(frees, self.alpha, 0), beta=torch.where(frees, self.beta, 1))

    def is_whole(self, max_len: int) -> Tensor:
        """Whether heads attend to all tokens of rows of up to `max_len`, [Hs] bool."""
        sink, start = self.at(max_len)
        return start <= sink


@dataclass(frozen=True, slots=True)
class Gate:
    """The learned gate of one layer (SeerAttention-R, arXiv 2506.08889) with the rotations that it needs."""

    query: Tensor  # [H, G, D, E] fp32, E the gate's dim
    key: Tensor  # [H, 3D, E] fp32
    query_norm: Tensor | None  # [E] fp32, None without RMSNorm
    key_norm: Tensor | None  # [E] fp32
    unrope: Tensor  # [T, D] fp32, cos then sin that undo the model's rotary embedding
    rope: Tensor | None  # [T, E] fp32, cos then sin of the gate's own, None without


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Everything about one layer that is known before serving, for the heads of one rank."""

    layer: int
    role: Role
    dense_output: bool = False  # attends to everything; a SELECT layer then chooses for the layers after it
    sink: Tensor | None = None  # [Hs] int32 tokens, SELECT layers
    recent: Tensor | None = None  # [Hs] int32 tokens, SELECT layers
    budget: Tensor | None = None  # [Hs] int32 tokens with sink and recent, SELECT layers
    window: Window | None = None  # WINDOW layers
    first_unit: Tensor | None = None  # [Hs] int64, of every n-th unit before the window, which heads attend to, too
    gate: Gate | None = None  # layers that select with a gate


@dataclass(frozen=True, slots=True)
class PageState:
    """What a policy keeps of a page, in the page's tail."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None  # None: the cache's

    def bytes(self, element_bytes: int) -> int:
        """Its size; `element_bytes` is that of a cached number."""
        return prod(self.shape) * (element_bytes if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens whose keys and values were just written to the cache."""

    slot_mapping: Tensor  # [T] int64, page * P + offset, -1 for padding
    positions: Tensor  # [T] int64, in their rows


@dataclass(frozen=True, slots=True)
class Measurement:
    """What selections lose against dense attention, in the layers that a step measures; NaN in all others."""

    layers: Collection[int]  # that attend a second time; to nothing, where `spans` say so
    spans: Tensor  # [L, B, 1, 2] int32, of a Selection: everything, or nothing
    recall: Tensor  # [L, B] fp32, softmax mass that the layer's selection keeps, mean over query heads
    error: Tensor  # [L, B] fp32, relative L2 error of the layer's output, mean over query heads


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: views of buffers that are allocated once, cut to its B rows."""

    table: PageTable
    everything: Selection  # Hs = 1, spans of the whole row
    selection: Selection
    windows: Tensor  # [L, B, Hs, 2] int32, the spans of WINDOW layers; L = 0 without any
    scores: Tensor  # [B, Hs, T] fp32, room of the selection layers
    lse: Tensor  # [B, Hq] fp32, of the latest attend
    attended_dense: Tensor  # [L, B, 1] int32, tokens attended by layers with dense output
    attended: Tensor  # [L, B, Hs] int32, tokens attended by the other layers
    # [B] int32 tokens: a row's budget in place of the plan's, its length where it attends to all, or POLICY_BUDGET
    row_budget: Tensor | None = None
    scratch: Tensor | None = None  # where blocks meet, on CUDA
    measurement: Measurement | None = None

    def attends_to(self, plan: LayerPlan) -> Selection:
        """What a layer attends to, once its selection is made."""
        if plan.dense_output:
            return self.everything
        return self.selection if plan.window is None else replace(self.selection, spans=self.windows[plan.layer])


def on_device(plans: Sequence[LayerPlan], device: torch.device) -> list[LayerPlan]:
    """The plans with their tensors on `device`; a tensor that layers share stays one tensor."""
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in moved:
                moved[id(value)] = value.to(device)
            return moved[id(value)]
        if isinstance(value, LayerPlan | Window | Gate):
            return replace(value, **{field.name: move(getattr(value, field.name)) for field in fields(value)})
        return value

    return [move(plan) for plan in plans]
