"""What measuring recall costs: decode steps that all measure a quarter of their layers, beside steps that do not.

One engine; runs alternate in random order. At `recall_sample` = s a share s of the steps costs what is measured here:
decode takes 1 + s * (measured / plain - 1) times as long on average. Every run must give the right tokens.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from kernels.bench.cpu.contenders import deep_model, needle, policies, prompt
from kernels.bench.cpu.decode import HEADS, engine
from kernels.bench.environment import options, write_record
from sparseserve.policies import Policy
from sparseserve.testing.engine import roomiest

CONTEXTS = (4096, 32768)
NAMES = ("streaming", "quest", "tidal, units of 32")
EVERY_STEP = 1 - 1e-9  # 1 would measure every layer
SAMPLE = 0.01


@dataclass(frozen=True, slots=True)
class Timing:
    """One policy at one context."""

    context: int
    policy: str
    plain_ms: float  # per token, median over the rounds of the median over steps
    measured_ms: float  # the same of steps that measure a quarter of their layers
    ratio: float  # measured / plain, median over the rounds
    again: float  # plain / plain, of neighbouring rounds
    at_sample: float  # what recall_sample = 0.01 adds to decode time, as a share
    right: bool  # every round gave the right tokens


def measure(name: str, policy: Policy, pipe: Connection, context: int, rounds: int) -> Timing:
    """The first round fills the prefix cache and is not counted."""
    wanted = needle(policy)
    kinds = {"plain": policy, "measured": policy.model_copy(update={"recall_sample": EVERY_STEP})}
    draw, right = random.Random(context), True
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in draw.sample(sorted(kinds), len(kinds)):
            pipe.send((kinds[kind], prompt(context, wanted)))
            taken, answer = pipe.recv()
            right = right and answer == wanted[1]
            if number:
                seconds[kind].append(taken)
    plain, measured = seconds["plain"], seconds["measured"]
    ratio = median(one / other for one, other in zip(measured, plain, strict=True))
    again = median(one / other for one, other in zip(plain[1:], plain, strict=False))
    return Timing(context, name, 1e3 * median(plain), 1e3 * median(measured), ratio, again, SAMPLE * (ratio - 1), right)


def table(timings: list[Timing]) -> Table:
    """The timings as people read them; a speed without the right tokens is left out."""
    out = Table(
        "policy", "context", "plain", "measured", "ratio", "plain / plain", f"at {SAMPLE}", title="ms per token"
    )
    for timing in timings:
        numbers = timing.plain_ms, timing.measured_ms, timing.ratio, timing.again
        cells = [*(f"{number:.2f}" for number in numbers), f"+{timing.at_sample:.2%}"]
        out.add_row(timing.policy, str(timing.context), *(cells if timing.right else ["wrong tokens"] * 5))
    return out


def main() -> None:
    """Measure, print, write JSON."""
    told = options(__doc__)
    with TemporaryDirectory() as folder:
        model = Path(folder) / "deep"
        deep_model(model, told.layers)
        contenders = {name: policies(Path(folder), told.layers)[name] for name in NAMES}
        spawn = get_context("spawn")
        pipe, theirs = spawn.Pipe()
        first = roomiest(contenders.values(), HEADS, page_size=128)
        spawn.Process(target=engine, args=(str(model), first, theirs), daemon=True).start()
        assert pipe.recv() == "ready"
        timings = [
            measure(name, policy, pipe, context, told.rounds)
            for context in CONTEXTS
            for name, policy in contenders.items()
        ]
        pipe.send(None)
    Console().print(table(timings))
    write_record(told, [asdict(timing) for timing in timings])


if __name__ == "__main__":
    main()
