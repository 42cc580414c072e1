"""Contenders in CUDA graphs: checked, replayed in turns, timed by events."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

LEAST_CALLS = 64  # in a graph, so that its launch does not count


@dataclass(frozen=True, slots=True)
class Contender:
    """What one layer does in a decode step."""

    kernels: tuple[int, ...]  # bytes that each of its kernels moves, by the byte model
    call: Callable[[int], object]  # does the work of a layer
    results: tuple[Tensor, ...]  # all that the calls of all layers write
    check: Callable[[], None]  # raises AssertionError when the results are wrong


Builders = dict[str, Callable[[], Contender]]


class Wrong(Exception):
    """The results of a contender are wrong."""


@dataclass(slots=True)
class Outcome:
    """What became of a contender."""

    kernels: tuple[int, ...] = ()
    seconds: list[float] = field(default_factory=list)  # of a call, for every round; none if there is a note
    note: str = ""  # why there are none


class Device(Protocol):
    """What measures: a GPU."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work of `run`."""

    def seconds(self, replay: Callable[[], None]) -> float:
        """The time that it takes."""


class Gpu:
    """The current CUDA device."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, replay: Callable[[], None]) -> float:
        """The second of two replays: while the first one runs, the second is enqueued, so its launch does not count."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        replay()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def measure(builders: Builders, layers: int, device: Device, rounds: int) -> dict[str, Outcome]:
    """Build, check and capture every contender, then let them take turns; what fails says why and is not timed."""
    outcomes = {name: Outcome() for name in builders}
    ready: dict[str, tuple[Callable[[], None], Contender]] = {}  # a graph does not own the memory that it uses
    repeats = -(-LEAST_CALLS // layers)
    for name, build in builders.items():
        try:
            contender = build()
            outcomes[name].kernels = contender.kernels
            ready[name] = checked(contender, layers, repeats, device), contender
        except ImportError as error:
            outcomes[name].note = f"not there: {error}"
        except Wrong as error:
            outcomes[name].note = f"wrong: {error}"
        except Exception as error:  # of a library, a compiler or a launch: the others go on
            outcomes[name].note = f"failed: {type(error).__name__}: {error}"
    names = list(ready)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            outcomes[name].seconds.append(device.seconds(ready[name][0]) / (layers * repeats))
    return outcomes


def checked(contender: Contender, layers: int, repeats: int, device: Device) -> Callable[[], None]:
    """The captured calls of all layers, `repeats` times, once their results are right and the same as uncaptured."""

    def run(times: int) -> None:
        for _ in range(times):
            for layer in range(layers):
                contender.call(layer)

    def clear() -> None:
        for result in contender.results:
            result.zero_()

    clear()
    run(1)
    try:
        contender.check()
    except AssertionError as error:
        raise Wrong(str(error)) from error
    eager = [result.clone() for result in contender.results]
    replay = device.capture(lambda: run(repeats))
    clear()
    replay()
    if not all(map(torch.equal, contender.results, eager)):
        raise Wrong("a replay of the graph gives other results than the calls")
    return replay
