"""Decode time per token with heads that store only their windows, beside the same policy with shared memory.

An engine of each kind lives side by side; runs alternate in random order, so a ratio compares neighbours in time. Both
must give the answer that a needle far back has (policies that may lose it are asked for one nearby). The model is that
of decode.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from kernels.bench.cpu.contenders import deep_model, needle, policies, prompt
from kernels.bench.cpu.decode import engine
from kernels.bench.environment import options, write_record
from sparseserve.policies import Policy

CONTEXTS = (4096, 16384)


@dataclass(frozen=True, slots=True)
class Timing:
    """One policy at one context."""

    context: int
    policy: str
    shared_ms: float  # per token, median over the rounds of the median over steps
    per_head_ms: float
    ratio: float  # shared / per head, median over the rounds
    again: float  # shared / shared, of neighbouring rounds
    right: bool  # every round gave the right tokens


@contextmanager
def engines(model: str, policy: Policy) -> Iterator[dict[str, Connection]]:
    """An engine with shared memory, and one with memory of heads."""
    spawn, pipes = get_context("spawn"), {}
    for memory in ("shared", "per_head"):
        pipes[memory], theirs = spawn.Pipe()
        changed = policy.model_copy(update={"kv_memory": memory})
        spawn.Process(target=engine, args=(model, changed, theirs), daemon=True).start()
        assert pipes[memory].recv() == "ready"
    yield pipes
    for pipe in pipes.values():
        pipe.send(None)


def measure(name: str, policy: Policy, pipes: dict[str, Connection], context: int, rounds: int) -> Timing:
    """The first run of both fills their prefix caches and is not timed."""
    wanted = needle(policy)
    draw, right = random.Random(context), True
    seconds: dict[str, list[float]] = {memory: [] for memory in pipes}
    for number in range(rounds + 1):
        for memory in draw.sample(sorted(pipes), len(pipes)):
            pipes[memory].send((None, prompt(context, wanted)))
            taken, answer = pipes[memory].recv()
            right = right and answer == wanted[1]
            if number:
                seconds[memory].append(taken)
    shared, per_head = seconds["shared"], seconds["per_head"]
    ratio = median(one / other for one, other in zip(shared, per_head, strict=True))
    again = median(one / other for one, other in zip(shared[1:], shared, strict=False))
    return Timing(context, name, 1e3 * median(shared), 1e3 * median(per_head), ratio, again, right)


def table(timings: list[Timing]) -> Table:
    """The timings as people read them; a speed without the right tokens is left out."""
    out = Table("policy", "context", "shared", "per head", "shared / per head", "shared / shared", title="ms per token")
    for timing in timings:
        numbers = timing.shared_ms, timing.per_head_ms, timing.ratio, timing.again
        cells = [f"{number:.2f}" for number in numbers] if timing.right else ["wrong tokens"] * 4
        out.add_row(timing.policy, str(timing.context), *cells)
    return out


def main() -> None:
    """Measure, print, write JSON."""
    told, timings = options(__doc__), []
    with TemporaryDirectory() as folder:
        model = Path(folder) / "deep"
        deep_model(model, told.layers)
        for name, policy in policies(Path(folder), told.layers).items():
            if "kv_memory" not in type(policy).model_fields:
                continue
            with engines(str(model), policy) as pipes:
                timings += [measure(name, policy, pipes, context, told.rounds) for context in CONTEXTS]
    Console().print(table(timings))
    write_record(told, [asdict(timing) for timing in timings])


if __name__ == "__main__":
    main()
