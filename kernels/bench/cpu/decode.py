"""Decode time per token, end to end through vLLM: the policies beside vLLM's own CPU_ATTN without the plugin.

The model is the demo model with inert layers on top (their output projections are zero): it costs what a model of
`--layers` layers costs and still answers, so every timing comes with the proof that its tokens were right. Two engines
live side by side, one without the plugin, one whose policy is exchanged and whose page summaries are rebuilt for it;
runs alternate in random order. vLLM runs as it comes, compiled.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from kernels.bench.cpu.contenders import deep_model, needle, policies, prompt
from kernels.bench.environment import options, write_record
from sparseserve.config import WORKERS, to_dict
from sparseserve.demo import circuits
from sparseserve.policies import Policy
from sparseserve.testing.engine import rebind, roomiest, running_pages
from sparseserve.types import HeadShape

HEADS = HeadShape(circuits.KV_HEADS, circuits.GROUP, circuits.HEAD_DIM)
CONTEXTS = (512, 4096, 16384, 32768)
CONTROL, AGAIN = "CPU_ATTN", "CPU_ATTN again"
TOKENS = 16  # the value; the tokens after it are not timed


@dataclass(frozen=True, slots=True)
class Timing:
    """One context under one policy."""

    context: int
    policy: str
    ms_per_token: float  # median over the rounds of the median over steps
    spread: float  # (slowest - fastest round) / median
    speedup: float  # CPU_ATTN / this
    right: bool  # every round gave the right tokens


def engine(model: str, first: Policy | None, pipe: Connection) -> None:
    """A child process: binds policies and times decodes on request; without `first`, without the plugin."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "sparseserve" if first else "",
    }
    from vllm import LLM

    settings: dict[str, Any] = {}
    if first:
        settings = {"additional_config": {"sparseserve": to_dict(first)}, "worker_cls": WORKERS["cpu"]}
    llm = LLM(model, max_model_len=CONTEXTS[-1] + 256, max_num_seqs=4, **settings)
    pages: list[int] = []
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        policy, text = request
        if policy is not None:
            llm.collective_rpc(rebind, args=(policy, pages))
        seconds, answer, pages = decode(llm, text)
        pipe.send((seconds, answer))


def decode(llm: Any, text: str) -> tuple[float, str, list[int]]:
    """Median seconds of a decode step, the value that was generated, and the pages that hold the prompt."""
    from vllm import SamplingParams

    core = llm.llm_engine
    core.add_request("bench", text, SamplingParams(temperature=0, max_tokens=TOKENS))
    times, answer = [], ""
    pages: list[int] = []
    while core.has_unfinished_requests():
        start = time.perf_counter()
        outputs = core.step()
        times.append(time.perf_counter() - start)
        answer = outputs[0].outputs[0].text if outputs else answer
        if outputs and not pages:
            [pages] = llm.collective_rpc(running_pages)
    return median(times[-(TOKENS - 2) :]), answer, pages


def measure(model: str, policies: dict[str, Policy], rounds: int, console: Console) -> list[Timing]:
    """Every policy at every context."""
    spawn = get_context("spawn")
    pipes = {}
    largest = roomiest(policies.values(), HEADS, page_size=128)
    for plugin in (False, True):
        pipes[plugin], theirs = spawn.Pipe()
        spawn.Process(target=engine, args=(model, largest if plugin else None, theirs), daemon=True).start()
        assert pipes[plugin].recv() == "ready"
    candidates: dict[str, Policy | None] = {CONTROL: None, AGAIN: None, **policies}

    def run(policy: Policy | None, context: int) -> tuple[float, bool]:
        pipe = pipes[policy is not None]
        wanted = needle(policy)
        pipe.send((policy, prompt(context, wanted)))
        seconds, answer = pipe.recv()
        return seconds, answer == wanted[1]

    timings = []
    shuffle = random.Random(0).shuffle
    for context in CONTEXTS:
        console.print(f"{context} tokens: prefill, then {rounds} rounds ...")
        for policy in (None, candidates["dense"]):
            run(policy, context)  # fills the prefix cache
        results: dict[str, list[tuple[float, bool]]] = {name: [] for name in candidates}
        for _ in range(rounds):
            order = list(candidates)
            shuffle(order)
            for name in order:
                results[name].append(run(candidates[name], context))
        timings += [_timing(context, name, results) for name in candidates]
    for pipe in pipes.values():
        pipe.send(None)
    return timings


def _timing(context: int, name: str, results: dict[str, list[tuple[float, bool]]]) -> Timing:
    seconds = [second for second, _ in results[name]]
    middle = median(seconds)
    control = median(second for second, _ in results[CONTROL])
    right = all(right for _, right in results[name])
    return Timing(context, name, 1e3 * middle, (max(seconds) - min(seconds)) / middle, control / middle, right)


def table(timings: list[Timing]) -> Table:
    """The timings as people read them; a speed without the right tokens is left out."""
    out = Table(
        "policy", *(f"{context} tokens" for context in CONTEXTS), title="decode, ms per token (CPU_ATTN / this)"
    )
    for name in dict.fromkeys(timing.policy for timing in timings):
        cells = [
            f"{timing.ms_per_token:.2f} ({timing.speedup:.2f}x)" if timing.right else "wrong tokens"
            for timing in timings
            if timing.policy == name
        ]
        out.add_row(name, *cells)
    return out


def main() -> None:
    """Measure, print, write JSON."""
    told, console = options(__doc__), Console()
    with TemporaryDirectory() as folder:
        model = Path(folder) / "deep"
        deep_model(model, told.layers)
        timings = measure(str(model), policies(Path(folder), told.layers), told.rounds, console)
    console.print(table(timings))
    write_record(told, [asdict(timing) for timing in timings])


if __name__ == "__main__":
    main()
