"""Time of every op on a GPU beside a copy, the floor of the byte model, and the dense attention of others.

    python -m kernels.bench.gpu.layer_times --commit $(git rev-parse HEAD) --json gpu.json

Needs torch and the built CUDA kernels; FlashAttention-3 and FlashInfer take part where they can be imported. A
contender is the work of one layer of Llama-3.1-8B (8 KV heads, groups of 4, D 128, bf16) in a decode step, captured in
a CUDA graph for so many layers with caches of their own that the L2 does not hold what they read. Contenders take turns
in random order. Each is checked against the reference first, and its replayed graph against its calls: what is wrong
has no time.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path

import torch

from kernels.bench.gpu.baselines import baselines
from kernels.bench.gpu.contenders import contenders
from kernels.bench.gpu.layers import LLAMA_8B, Layers, Point
from kernels.bench.gpu.report import Entry, compare, document, entries, report, sensors
from kernels.bench.gpu.timing import Gpu, measure

POINTS = ["4096x1", "32768x1", "32768x8", "131072x4"]  # tokens x rows
PAGE_SIZES = [64, 16]  # our launcher's, which hold units of quest and seer, and vLLM's own


def measure_point(point: Point, token_first: bool, rounds: int) -> list[Entry]:
    """All contenders at a point."""
    device = torch.device("cuda")
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    layers = Layers(point, LLAMA_8B, token_first, device, l2_bytes)
    outcomes = measure(contenders(layers, l2_bytes) | baselines(layers), layers.count, Gpu(), rounds)
    return entries(point, outcomes)


def shape(text: str) -> tuple[int, int]:
    """Tokens and rows of a point."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)) or int(match[1]) % max(PAGE_SIZES):
        raise argparse.ArgumentTypeError(f"{text} is not TOKENSxROWS with a multiple of {max(PAGE_SIZES)} tokens")
    return int(match[1]), int(match[2])


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the kernels that are measured")
    parser.add_argument("--json", type=Path, help="write the results here, after every point")
    parser.add_argument("--points", nargs="+", type=shape, default=[shape(text) for text in POINTS])
    parser.add_argument("--page-sizes", nargs="+", type=int, choices=PAGE_SIZES, default=PAGE_SIZES)
    parser.add_argument("--layout", choices=["LBHNC", "LBNHC"], default="LBHNC", help="order of heads and tokens")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def main() -> None:
    """Measure, write JSON, print."""
    options = parse()
    run: list[Entry] = []
    clocks = {"start": sensors()}
    for page_size in options.page_sizes:
        for context, batch in options.points:
            point, start = Point(context, batch, page_size), time.perf_counter()
            run += measure_point(point, options.layout == "LBNHC", options.rounds)
            clocks[f"{point}, pages of {page_size}"] = sensors()
            print(f"{point}, pages of {page_size}: {time.perf_counter() - start:.0f} s", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            compare(run)
            if options.json:
                more = {"layout": options.layout, "rounds": options.rounds, "clocks": clocks}
                options.json.write_text(json.dumps(document(options.commit, run, **more), indent=1) + "\n")
    print(report(run))


if __name__ == "__main__":
    main()
