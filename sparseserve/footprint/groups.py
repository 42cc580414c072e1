"""Which KV heads store what: per-head budgets as groups of heads with one page table each.

All groups draw pages from one pool. A page has `slots` slots, each P tokens of one KV head; a group gives every one of
its heads a slot. The first group holds the heads that need everything, if there are any; the others hold heads whose
windows were rounded up to one of at most `MAX_CLASSES` sizes, and free the pages that fell out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sparseserve.model import ModelShape
from sparseserve.policies.base import Policy
from sparseserve.types import LayerPlan, window_start

MAX_CLASSES = 3  # sizes that windows are rounded up to
MAX_GROUPS = 12  # page tables of a row
MAX_CUTS = 32  # places between windows of different sizes that the search for classes tries
EPSILON = 1e-6  # tokens; a class is never shorter than a window because of how numbers are rounded

RankPlans = tuple[tuple[LayerPlan, ...], ...]  # by tensor-parallel rank and layer


@dataclass(frozen=True, slots=True)
class HeadWindow:
    """What a row keeps: the first `sink` tokens and, at N tokens, the last max(alpha + beta * N, minimum).

    Rows of up to `dense_up_to` tokens keep everything. With beta <= 1 what was dropped is never needed again.
    """

    sink: int  # tokens
    alpha: float  # tokens
    beta: float
    minimum: int = 0  # tokens
    dense_up_to: int = 0  # tokens

    def start(self, length: int) -> int:
        """The first of the last tokens that a row of `length` tokens keeps."""
        if length <= self.dense_up_to:
            return 0
        return int(window_start(length, self.alpha + EPSILON, self.beta, self.minimum))

    def sink_pages(self, page_size: int) -> int:
        """Pages that hold the sink."""
        return -(-self.sink // page_size)

    def freed_pages(self, length: int, page_size: int) -> int:
        """Pages between the sink and the last tokens of a row of `length` tokens."""
        return max(0, self.start(length) // page_size - self.sink_pages(page_size))

    def pages(self, length: int, page_size: int) -> int:
        """Pages that a row of `length` tokens keeps."""
        return -(-length // page_size) - self.freed_pages(length, page_size)


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the KV heads of every layer of one rank are stored; all ranks have the same slots and windows."""

    slots: int  # S, heads that a page has room for
    windows: tuple[HeadWindow | None, ...]  # of every group; None keeps everything
    places: Tensor  # [L, H, 2] int32, of every KV head: its group and its slot

    def heads(self, layer: int, group: int) -> list[int]:
        """KV heads of a layer in a group, ascending; their slots are consecutive."""
        return (self.places[layer, :, 0] == group).nonzero().flatten().tolist()

    def slots_of(self, layer: int, heads: Sequence[int]) -> slice:
        """The slots of a layer's heads in a group."""
        first = int(self.places[layer, heads[0], 1]) if heads else 0
        return slice(first, first + len(heads))

    def group_heads(self, group: int) -> int:
        """KV heads of all layers in a group."""
        return int((self.places[..., 0] == group).sum())

    def layer_part(self, model: ModelShape) -> int:
        """Numbers that a layer of the model adds to a page for each of its tokens; together they hold the slots."""
        return -(-self.slots * 2 * model.heads.head_dim // model.layers)

    def pages(self, length: int, page_size: int) -> list[int]:
        """Pages of every group that a row of `length` tokens keeps."""
        return [
            -(-length // page_size) if window is None else window.pages(length, page_size) for window in self.windows
        ]


@dataclass(frozen=True, slots=True)
class _Head:
    """A KV head and what it keeps; `kept` tokens at the longest length."""

    rank: int
    layer: int
    head: int
    window: HeadWindow | None
    kept: int


def plan_ranks(policy: Policy, model: ModelShape) -> RankPlans:
    """The plan of every layer, of every tensor-parallel rank of the model."""
    return tuple(policy.plans(replace(model, rank=rank)) for rank in range(model.ranks))


def store_heads(policy: Policy, model: ModelShape) -> Storage:
    """Group the KV heads of the model by what they keep, and give this rank's their slots."""
    return store_planned(policy, plan_ranks(policy, model), model)


def store_planned(policy: Policy, plans: RankPlans, model: ModelShape) -> Storage:
    """`store_heads` of a model whose ranks have these plans."""
    heads = [head for rank, planned in enumerate(plans) for head in _heads(policy, planned, replace(model, rank=rank))]
    full = [head for head in heads if head.window is None]
    windowed = sorted((head for head in heads if head.window is not None), key=lambda head: head.kept)
    packing = _cheapest(full, windowed, model)
    runs = [windowed[begin:end] for begin, end in pairwise(packing.bounds)]
    windows: list[HeadWindow | None] = []
    places = torch.zeros(model.layers, model.heads.kv_heads, 2, dtype=torch.int32)
    for run in [full, *runs] if full else runs:
        mine = sorted((head for head in run if head.rank == model.rank), key=lambda head: (head.layer, head.head))
        for i, head in enumerate(mine):
            places[head.layer, head.head] = torch.tensor([len(windows) + i // packing.slots, i % packing.slots])
        windows += [_covering(run, model.max_len)] * -(-_load(run, model.ranks) // packing.slots)
    return Storage(packing.slots, tuple(windows), places)


def _heads(policy: Policy, plans: Sequence[LayerPlan], model: ModelShape) -> Iterable[_Head]:
    for plan in plans:
        for head, window in enumerate(head_windows(plan, policy, model)):
            kept = model.max_len if window is None else window.pages(model.max_len, model.page_size) * model.page_size
            yield _Head(model.rank, plan.layer, head, window, kept)


def head_windows(plan: LayerPlan, policy: Policy, model: ModelShape) -> list[HeadWindow | None]:
    """What every KV head of a layer keeps; None for heads that attend to everything."""
    heads, planned = model.heads.kv_heads, plan.window
    if planned is None:
        return [None] * heads
    windows: list[HeadWindow | None] = []
    columns = (
        planned.sink.tolist(),
        planned.alpha.tolist(),
        planned.beta.tolist(),
        planned.is_whole(model.max_len).tolist(),
    )
    for sink, alpha, beta, whole in zip(*columns, strict=True):
        lines = [(a - sink, b) for a, b in zip(alpha, beta, strict=True)]
        window = HeadWindow(sink, *_chord(lines, model.max_len), planned.minimum - sink, policy.dense_up_to)
        windows.append(None if whole else window)
    return windows * (heads // len(windows))


def _chord(lines: Sequence[tuple[float, float]], max_len: int) -> tuple[float, float]:
    """The lowest line alpha + beta * N that from 0 to `max_len` tokens is nowhere below one of `lines`."""
    first = max(alpha for alpha, _ in lines)
    last = max(alpha + beta * max_len for alpha, beta in lines)
    return first, (last - first) / max_len


def _covering(heads: Sequence[_Head], max_len: int) -> HeadWindow | None:
    """What the group of `heads` keeps."""
    windows = [head.window for head in heads if head.window is not None]
    if not windows:
        return None
    line = _chord([(window.alpha, window.beta) for window in windows], max_len)
    sink, minimum = max(window.sink for window in windows), max(window.minimum for window in windows)
    return HeadWindow(sink, *line, minimum, windows[0].dense_up_to)


def _load(heads: Sequence[_Head], ranks: int) -> int:
    """Heads of the rank that has most of them."""
    return max(sum(head.rank == rank for head in heads) for rank in range(ranks))


@dataclass(frozen=True, slots=True)
class _Packing:
    """Runs of windowed heads, each rounded up to its longest, in pages of `slots` slots."""

    cost: int  # tokens of one slot that the longest row takes
    groups: int
    slots: int
    bounds: tuple[int, ...]  # of the runs; begins with 0


def _cheapest(full: Sequence[_Head], windowed: Sequence[_Head], model: ModelShape) -> _Packing:
    """The packing of which the longest row takes least; `windowed` ascends. `full` heads share a group."""
    most = _load(full, model.ranks)
    ends = [i for i, (head, later) in enumerate(pairwise(windowed), 1) if head.kept != later.kept] + [len(windowed)]
    ends = ends[::-1][:: -(-len(ends) // MAX_CUTS)][::-1]
    runs = [(begin, end) for end in ends for begin in [0, *ends] if begin < end]
    loads = {(begin, end): _load(windowed[begin:end], model.ranks) for begin, end in runs}
    packings = []
    for slots in range(max(most, 1), max(most, _load(windowed, model.ranks)) + 1):
        start = _Packing(slots * model.max_len, 1, slots, (0,)) if full else _Packing(0, 0, slots, (0,))
        packings += _runs(start, ends, loads, windowed)
    return min(packings, key=lambda packing: (packing.cost, packing.groups))


def _runs(
    start: _Packing, ends: Sequence[int], loads: Mapping[tuple[int, int], int], windowed: Sequence[_Head]
) -> list[_Packing]:
    """The cheapest packings of all heads in at most MAX_CLASSES runs, for every number of groups up to MAX_GROUPS."""
    best = {(0, start.groups): start}
    for _ in range(MAX_CLASSES):
        for packing in list(best.values()):
            begin = packing.bounds[-1]
            for end in (end for end in ends if end > begin):
                parts = -(-loads[begin, end] // start.slots)
                cost = packing.cost + parts * start.slots * windowed[end - 1].kept
                longer = _Packing(cost, packing.groups + parts, start.slots, (*packing.bounds, end))
                at = end, longer.groups
                if longer.groups <= MAX_GROUPS and (at not in best or cost < best[at].cost):
                    best[at] = longer
    return [packing for (end, _), packing in best.items() if end == len(windowed)]
