"""Decode time per step, end to end through vLLM on a GPU: policies beside vLLM without the plugin.

    PYTHONPATH=SITE python -m kernels.bench.gpu.vllm_times --commit COMMIT --json gpu-vllm.json

The model has the shape of Llama-3.1-8B and no trained weights, which costs the same: `load_format="dummy"`. Every
engine is a process of its own, one after the other. Rows have prompts of their own, for rows that share pages would
read them from the L2; the prompts of a point begin as those of the next longer one, so the prefix cache spares half of
the prefill. A prompt is prefilled once, then every round asks again for `TOKENS` more tokens: all rows hit the prefix
cache, start together and decode together; a round in which a step had not all rows is not recorded. Beside each time
stands what the kernels counted in the same steps: tokens attended to and resident. Untrained keys are alike, so what is
selected means nothing, and how much is selected does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from kernels.bench.gpu.layer_times import shape
from kernels.bench.gpu.layers import Point
from kernels.bench.gpu.report import columns, environment, sensors
from sparseserve.policies import POLICIES

POINTS = ["131072x4", "65536x8", "65536x1", "32768x16", "2048x16"]  # tokens x rows, longest prompts first
CONTROL, BUDGET, PAGE = "vllm", 2048, 64  # PAGE as our launcher has it
MEASURED = ("quest", "tidal")  # unless other engines are asked for
SETTINGS: dict[str, dict[str, Any]] = {"tidal": {"reselect_layer": 13}}  # beside the budget
TOKENS, SETTLING = 48, 8  # of every row and round; the first steps are not counted
COUNTED = ("kv_tokens_attended", "kv_tokens_resident", "decode_rows")
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


@dataclass(slots=True)
class Timing:
    """One engine at one point; without a time there is a note that says why."""

    context: int  # tokens of a row after the last step
    batch: int
    engine: str
    note: str = ""
    milliseconds: float | None = None  # median over the rounds of the median over steps
    spread: float | None = None  # (slowest - fastest round) / median
    attended: float | None = None  # tokens that a row attends to in a layer, mean; None where no row was sparse
    resident: float | None = None  # tokens that such a row holds
    speedup: float | None = None  # of vLLM without the plugin / this


def settings(engine: str) -> dict[str, Any]:
    """What vLLM is started with, beside the model."""
    if engine == CONTROL:
        return {}
    from sparseserve.config import WORKERS

    return {
        "additional_config": {"sparseserve": policy_settings(engine)},
        "worker_cls": WORKERS["cuda"],
        "attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}},
        "block_size": PAGE,
    }


def policy_settings(engine: str) -> dict[str, Any]:
    """All settings of a policy, as the plugin takes them."""
    from sparseserve.config import to_dict

    policy = POLICIES[engine](**SETTINGS.get(engine, {}))
    return to_dict(policy.model_copy(update=policy.at_budget(BUDGET)))


def serve(
    engine: str, model: str, points: list[tuple[int, int]], rounds: int, options: dict[str, Any], pipe: Connection
) -> None:
    """A child process: one engine, a Timing for every point, then None."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "" if engine == CONTROL else "sparseserve",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM

    rows = sorted({batch for _, batch in points})
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(context for context, _ in points),
        max_num_seqs=rows[-1],
        enable_prefix_caching=True,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": rows},
        **settings(engine),
        **options,
    )
    for context, batch in points:
        timing = Timing(context, batch, engine)
        try:
            measure(llm, timing, rounds)
        except Exception as error:
            timing.note = f"failed: {type(error).__name__}: {error}"
        pipe.send(timing)
    pipe.send(None)


def measure(llm: Any, timing: Timing, rounds: int) -> None:
    """Prefill, then the rounds; writes the numbers or the note."""
    cache = llm.llm_engine.vllm_config.cache_config
    capacity, needed = cache.num_gpu_blocks * cache.block_size, timing.batch * timing.context
    if capacity < needed:
        timing.note = f"no room: {needed} tokens in a cache of {capacity}"
        return
    prompts = [prompt(row, timing.context - TOKENS) for row in range(timing.batch)]
    for _ in steps(llm, prompts, tokens=1):
        pass
    before = counters() if timing.engine != CONTROL else []
    times = []
    for _ in range(rounds):
        seconds = [second for second, outputs in steps(llm, prompts, TOKENS) if outputs == timing.batch]
        if len(seconds) < TOKENS:
            timing.note = f"not together: {len(seconds)} of {TOKENS} steps had all rows"
            return
        times.append(1e3 * median(seconds[SETTLING:]))
    if timing.engine != CONTROL:
        attended, resident, rows = (after - since for after, since in zip(counters(), before, strict=True))
        if timing.context - TOKENS >= BUDGET and not attended < resident:
            timing.note = (
                f"inactive: {rows:.0f} rows under the policy attended to {attended:.0f} of {resident:.0f} tokens"
            )
            return
        layers = MODEL["num_hidden_layers"]
        timing.attended, timing.resident = (
            (attended / rows / layers, resident / rows / layers) if rows else (None, None)
        )
    timing.milliseconds, timing.spread = median(times), (max(times) - min(times)) / median(times)


def prompt(row: int, tokens: int) -> list[int]:
    """The prompt of a row; a shorter one is the beginning of a longer one."""
    draw = random.Random(row)
    return [draw.randrange(MODEL["vocab_size"]) for _ in range(tokens)]


def steps(llm: Any, prompts: list[list[int]], tokens: int) -> Iterator[tuple[float, int]]:
    """Seconds of every step of the engine until all prompts have `tokens` more tokens, and the rows that got one."""
    from vllm import SamplingParams

    core = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for row, ids in enumerate(prompts):
        core.add_request(f"{time.monotonic_ns()}-{row}", {"prompt_token_ids": ids}, params)
    while core.has_unfinished_requests():
        start = time.perf_counter()
        outputs = core.step()
        yield time.perf_counter() - start, len(outputs)


def counters() -> list[float]:
    """What the kernels of this process have counted, in the order of COUNTED."""
    from sparseserve.plugin.watch.meter import snapshot

    samples = [sample for *_, samples in snapshot() for sample in samples]
    return [sum(value for sample, _, value in samples if sample == f"sparseserve_{name}_total") for name in COUNTED]


def run(engine: str, report: Callable[[Timing], None], *arguments: object) -> None:
    """Report the timings of an engine as they come."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=serve, args=(engine, *arguments, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        while (timing := ours.recv()) is not None:
            report(timing)
    except EOFError:
        child.join()
        report(Timing(0, 0, engine, note=f"failed: the engine died with code {child.exitcode}"))
    child.join()


def compare(timings: list[Timing]) -> None:
    """Hold every timing against vLLM without the plugin."""
    control = {(t.context, t.batch): t.milliseconds for t in timings if t.engine == CONTROL}
    for timing in timings:
        own = control.get((timing.context, timing.batch))
        timing.speedup = own / timing.milliseconds if own and timing.milliseconds else None


def table(timings: list[Timing]) -> str:
    """A row for every engine, a column for every point."""
    points = list(dict.fromkeys((t.context, t.batch) for t in timings if t.batch))
    cells = {(t.engine, (t.context, t.batch)): cell(t) for t in timings}
    head = ["ms a step", *(str(Point(*point, PAGE)) for point in points)]
    names = dict.fromkeys(t.engine for t in timings)
    rows = [[name, *(cells.get((name, point), "") for point in points)] for name in names]
    notes = [f"{t.engine} at {t.context} x {t.batch}: {t.note}" for t in timings if t.note]
    legend = "ms, vLLM without the plugin / this, tokens a row attends to in a layer"
    return "\n".join([*notes, columns([head, *rows]), legend])


def cell(timing: Timing) -> str:
    """A timing as people read it."""
    if timing.milliseconds is None:
        return timing.note.split(":")[0]
    attended = "all" if timing.attended is None else f"{timing.attended:.0f}"
    speedup = "" if timing.speedup is None else f" {timing.speedup:.2f}x"
    return f"{timing.milliseconds:.2f}{speedup} {attended}"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of what is measured")
    parser.add_argument("--json", type=Path, help="write the results here, after every point")
    parser.add_argument("--points", nargs="+", type=shape, default=[shape(text) for text in POINTS])
    policies = [name for name, cls in POLICIES.items() if cls.has_defaults()]
    parser.add_argument("--engines", nargs="+", choices=[CONTROL, *policies], default=[CONTROL, *MEASURED])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.92, help="share of the GPU's memory that an engine takes")
    return parser.parse_args()


def main() -> None:
    """Measure, write JSON, print."""
    options = parse()
    timings: list[Timing] = []
    clocks = {"start": sensors()}

    def report(timing: Timing) -> None:
        timings.append(timing)
        compare(timings)
        clocks[f"{timing.engine}, {timing.context} x {timing.batch}"] = sensors()
        print(f"{timing.engine}, {timing.context} x {timing.batch}: {cell(timing)}", flush=True)
        if options.json:
            found = {"model": MODEL, "rounds": options.rounds, "clocks": clocks, "timings": [*map(asdict, timings)]}
            options.json.write_text(json.dumps(environment(options.commit) | found, indent=1) + "\n")

    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        for engine in options.engines:
            run(engine, report, folder, options.points, options.rounds, {"gpu_memory_utilization": options.memory})
    print(table(timings))


if __name__ == "__main__":
    main()
