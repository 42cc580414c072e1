"""What rows store of the KV cache on one rank, told from the plan of the layers, against dense attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sparseserve.footprint.groups import EPSILON, HeadWindow, Storage, head_windows
from sparseserve.footprint.reads import token_bytes
from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.types import LayerPlan, window_start


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """KV heads that keep the same tokens."""

    window: HeadWindow | None  # None keeps everything
    heads: int
    tables: int  # page tables; a row has as many pages in each

    def pages(self, length: int, page_size: int) -> int:
        """Pages that a row of `length` tokens keeps, in all page tables."""
        if self.window is None:
            return self.tables * -(-length // page_size)
        return self.tables * self.window.pages(length, page_size)

    def ends(self, length: int) -> tuple[int, int] | None:
        """How many first and last tokens a row of `length` tokens keeps; None for everything."""
        if self.window is None or (start := self.window.start(length)) <= self.window.sink:
            return None
        return self.window.sink, length - start


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that rows store; `full` and `window` with the empty slots of their pages."""

    full: int  # of heads that keep everything
    window: int  # of heads that keep a window
    page_state: int  # what policies know of pages, in their tails
    dense: int  # that dense attention stores

    @property
    def bytes(self) -> int:
        """All that the rows store."""
        return self.full + self.window + self.page_state

    @property
    def ratio(self) -> float:
        """How many times less than dense attention."""
        return self.dense / self.bytes

    def over(self, needed: int) -> float:
        """What pages cost over `needed` bytes, as a share: rounded windows, empty slots and padding."""
        return (self.full + self.window) / needed - 1


@dataclass(frozen=True, slots=True)
class Memory:
    """The pages of the cache: `slots` slots, each P tokens of one KV head, and what the policy keeps of it."""

    groups: tuple[HeadGroup, ...]
    page_size: int  # P, tokens
    slots: int  # S, KV heads that a page has room for
    page_bytes: int  # of the slots
    page_state_bytes: int  # of a page, beside its slots
    dense_bytes: int  # of P tokens of all KV heads

    def row(self, length: int) -> Stored:
        """What a row of `length` tokens stores from one step to the next."""
        full, window = (
            sum(group.pages(length, self.page_size) for group in self.groups if (group.window is None) == everything)
            for everything in (True, False)
        )
        return self.stored(full, window, -(-length // self.page_size))

    def stored(self, full: int, window: int, dense: int) -> Stored:
        """What so many pages hold; `dense` counts pages of all heads."""
        return Stored(
            full * self.page_bytes, window * self.page_bytes, dense * self.page_state_bytes, dense * self.dense_bytes
        )

    def capacity(self, pages: int, length: int) -> tuple[int, int]:
        """Tokens that `pages` pages hold in rows of `length` tokens, and those that dense attention would."""
        row, room = self.row(length), pages * (self.page_bytes + self.page_state_bytes)
        return room * length // row.bytes, room * length // row.dense


def memory_of(
    policy: Policy, plans: Sequence[LayerPlan], model: ModelShape, element_bytes: int, storage: Storage | None
) -> Memory:
    """The pages of the layers of `plans`, whose numbers take `element_bytes`; heads share them without `storage`."""
    size, heads = model.page_size, model.heads
    dense = len(plans) * size * token_bytes(heads, element_bytes)
    if storage is None:
        slots = len(plans) * heads.kv_heads
        state = len(plans) * policy.page_state_bytes(heads, size, element_bytes)
        return Memory((HeadGroup(None, slots, 1),), size, slots, dense, state, dense)
    page_bytes = model.layers * size * storage.layer_part(model) * element_bytes
    groups = [
        HeadGroup(window, sum(storage.group_heads(number) for number, _ in same), len(same))
        for window, same in (
            (window, [*same]) for window, same in groupby(enumerate(storage.windows), key=lambda one: one[1])
        )
    ]
    return Memory(tuple(groups), size, storage.slots, page_bytes, 0, dense)


def needed_bytes(policy: Policy, plans: Sequence[LayerPlan], model: ModelShape, element_bytes: int, length: int) -> int:
    """Bytes of the pages that every KV head by itself needs for a row of `length` tokens, if none was rounded up."""
    pages = sum(HeadGroup(window, 1, 1).pages(length, model.page_size) for window in _windows(policy, plans, model))
    return pages * model.page_size * 2 * model.heads.head_dim * element_bytes


def _windows(policy: Policy, plans: Sequence[LayerPlan], model: ModelShape) -> Iterator[HeadWindow | None]:
    for plan in plans:
        yield from head_windows(plan, policy, model) if policy.frees_pages else [None] * model.heads.kv_heads


class StepFootprint:
    """What the rows of a step hold, from their lengths alone."""

    def __init__(self, memory: Memory) -> None:
        self._memory, size = memory, memory.page_size
        windows = [(group.tables, group.window) for group in memory.groups if group.window is not None]
        self._window_tables = sum(tables for tables, _ in windows)
        self._full_tables = sum(group.tables for group in memory.groups) - self._window_tables
        columns = [
            [tables, window.alpha, window.beta, window.minimum, window.dense_up_to, window.sink_pages(size)]
            for tables, window in windows
        ]
        self._columns = torch.tensor(columns, dtype=torch.float64).view(len(windows), 6).T[..., None]

    def hold(self, before: Tensor, after: Tensor) -> tuple[Stored, int]:
        """What rows hold that go from `before` to `after` tokens [B], and the pages that leave their windows thereby.

        A window frees what the first token of a step does not need; pages that it skipped, as those before a prefix
        that was found, were never held.
        """
        size = self._memory.page_size
        gone, leaving = 0, 0
        if self._window_tables:
            gone, leaving = self.freed(torch.cat([before, after]) + 1).view(2, -1).sum(1).int().tolist()
        pages = int((after + (size - 1)).div(size, rounding_mode="floor").sum())
        held = self._memory.stored(self._full_tables * pages, self._window_tables * pages - gone, pages)
        return held, leaving - gone

    def freed(self, lengths: Tensor) -> Tensor:
        """Pages [B] fp64 between sink and window of rows of `lengths` tokens: `freed_pages` of all tables."""
        tables, alpha, beta, minimum, dense_up_to, sink = self._columns
        lengths = lengths.double()
        start = window_start(lengths, alpha + EPSILON, beta, minimum) * (lengths > dense_up_to)
        pages = start.div(self._memory.page_size, rounding_mode="floor") - sink
        total: Tensor = (tables * pages.clamp(min=0)).sum(0)
        return total
