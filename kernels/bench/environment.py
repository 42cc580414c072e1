"""Where and when a measurement was made."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import date
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from sparseserve import ops


def options(description: str | None) -> argparse.Namespace:
    """What benchmarks through vLLM are told: `json` (a file, or None), `layers` and `rounds`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def write_record(told: argparse.Namespace, timings: list[dict[str, Any]]) -> None:
    """Write the timings, and what they were measured with, if a file was asked for."""
    if told.json:
        told.json.parent.mkdir(parents=True, exist_ok=True)
        run = {"layers": told.layers, "rounds": told.rounds, "timings": timings}
        told.json.write_text(json.dumps(environment() | run, indent=1) + "\n")


def environment() -> dict[str, str | int]:
    """Date, processor, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": ops.isa(),
        "torch": version("torch"),
        "vllm": version(packages_distributions()["vllm"][0]),
        "sparseserve": version("sparseserve"),
    }
