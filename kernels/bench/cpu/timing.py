"""Contenders that take turns, and the bare reads that they are held against."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from kernels.bench.cpu.pool import PAGE, UNIT, Requests

TOUCHED_BYTES = 96 << 20  # well above the last-level cache

Call = Callable[[int], object]  # does the work of request i


@dataclass(frozen=True, slots=True)
class Result:
    """One contender at one shape."""

    op: str
    context: int
    group: int
    head_dim: int
    microseconds: float  # median of the rounds
    best_microseconds: float
    bytes: int
    gigabytes_per_second: float
    share_of_read: float  # of the speed of the bare read


def read(memory: Tensor, starts: Tensor, rows: int, row_bytes: int, stride: int, prefetch: bool) -> None:
    """The bare read of blocks of rows."""
    torch.ops.sparseserve_bench.read(memory, starts, rows, row_bytes, stride, prefetch, torch.empty_like(starts))


def measure(calls: dict[str, Call], touched: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every contender and round; a round of a contender touches TOUCHED_BYTES."""
    repeats = max(2, -(-TOUCHED_BYTES // touched))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            for i in range(repeats):
                calls[name](i)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def results(requests: Requests, calls: dict[str, Call], touched: int, rounds: int) -> list[Result]:
    """Rows of the report; the faster of the two bare reads is the standard of the others."""
    seconds = measure(calls, touched, rounds)
    standard = min(median(times) for name, times in seconds.items() if name.startswith("read"))
    shape = requests.shape
    return [
        Result(
            op=name,
            context=requests.context,
            group=shape.queries_per_kv,
            head_dim=shape.head_dim,
            microseconds=median(times) * 1e6,
            best_microseconds=min(times) * 1e6,
            bytes=touched,
            gigabytes_per_second=touched / median(times) / 1e9,
            share_of_read=standard / median(times),
        )
        for name, times in seconds.items()
    ]


def tiles_call(requests: Requests, lists: list[list[Tensor]], values: bool, prefetch: bool) -> Call:
    """Bare read of K (and V) tiles; lists[i][h] are the tiles of request i and KV head h."""
    dim = requests.shape.head_dim

    def starts(of: Callable[[int, Tensor, int], Tensor]) -> list[Tensor]:
        return [torch.cat([of(i, tiles, h) for h, tiles in enumerate(heads)]) for i, heads in enumerate(lists)]

    key_starts, value_starts = starts(requests.tile_starts), starts(requests.value_starts)

    def call(i: int) -> None:
        read(requests.cache, key_starts[i % len(lists)], dim, 2 * UNIT, 2 * PAGE, prefetch)
        if values:
            read(requests.cache, value_starts[i % len(lists)], 1, 2 * UNIT * dim, 0, prefetch)

    return call


def pages_call(memory: Tensor, pages: Tensor, page_bytes: int, heads: int, head_bytes: int, prefetch: bool) -> Call:
    """Bare read of `head_bytes` of every head of whole pages; row i of pages is request i."""
    head = torch.arange(heads) * head_bytes
    starts = [(row.long() * page_bytes + head[:, None]).flatten() for row in pages]
    return lambda i: read(memory, starts[i % len(starts)], 1, head_bytes, 0, prefetch)
