"""Where and when a measurement was made."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import packages_distributions, version
from pathlib import Path

from sparseserve import ops


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
