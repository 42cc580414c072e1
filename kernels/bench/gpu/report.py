"""What a run on a GPU found, as JSON and as a short table."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import distributions
from statistics import median
from typing import Any

import torch

from kernels.bench.gpu.baselines import MAKERS as BASELINES
from kernels.bench.gpu.byte_model import floor_microseconds
from kernels.bench.gpu.layers import Point
from kernels.bench.gpu.timing import Outcome

DEFINITIONS = {
    "bytes": "by the byte model; a copy of n bytes moves 2 n, it reads and it writes",
    "share_of_copy": "bytes per second over those of the fastest copy of the run",
    "floor_microseconds": "sum over the kernels of max(2.5 us, bytes / (0.9 * 4.3 TB/s)), as in roofline.py",
    "over_floor": "median over floor",
    "speedup": "median of the fastest dense attention of others at the same point over this median",
}
LEGEND = "us a layer, share of the fastest copy, fastest dense attention of others / this, this / floor"
SENSORS = (
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "power.draw", "temperature.gpu", "clocks_event_reasons.active"),
)


@dataclass(slots=True)
class Entry:
    """One contender at one point; without numbers there is a note that says why."""

    context: int
    batch: int
    page_size: int
    contender: str
    note: str
    bytes: int
    floor_microseconds: float
    microseconds: float | None = None  # median of the rounds
    best_microseconds: float | None = None
    gigabytes_per_second: float | None = None
    over_floor: float | None = None
    share_of_copy: float | None = None
    speedup: float | None = None

    @property
    def where(self) -> tuple[int, int, int]:
        """The point."""
        return self.context, self.batch, self.page_size


def entries(point: Point, outcomes: dict[str, Outcome]) -> list[Entry]:
    """The outcomes at a point, not yet compared."""
    return [_entry(point, name, outcome) for name, outcome in outcomes.items()]


def _entry(point: Point, name: str, outcome: Outcome) -> Entry:
    moved, floor = sum(outcome.kernels), floor_microseconds(outcome.kernels)
    entry = Entry(point.context, point.batch, point.page_size, name, outcome.note, moved, floor)
    if outcome.seconds:
        entry.microseconds, entry.best_microseconds = 1e6 * median(outcome.seconds), 1e6 * min(outcome.seconds)
        entry.gigabytes_per_second = moved / entry.microseconds / 1e3
        entry.over_floor = entry.microseconds / floor
    return entry


def compare(run: Sequence[Entry]) -> None:
    """Hold every entry against the fastest copy of the run and the fastest baseline of its point."""
    timed = [(entry, entry.microseconds) for entry in run if entry.microseconds]
    fastest = max((entry.gigabytes_per_second or 0 for entry, _ in timed if _is_copy(entry)), default=0)
    for entry, own in timed:
        dense = [taken for other, taken in timed if other.where == entry.where and other.contender in BASELINES]
        entry.share_of_copy = (entry.gigabytes_per_second or 0) / fastest if fastest else None
        entry.speedup = min(dense) / own if dense and not _is_copy(entry) else None


def _is_copy(entry: Entry) -> bool:
    return entry.contender.startswith("copy")


def report(run: Sequence[Entry]) -> str:
    """A table for every page size, what has no numbers, and what the numbers mean."""
    parts = [_table(size, [entry for entry in run if entry.page_size == size]) for size in _unique(run, "page_size")]
    notes = dict.fromkeys(f"{entry.contender}: {entry.note.splitlines()[0]}" for entry in run if entry.note)
    return "\n\n".join(["\n".join(notes), *parts, LEGEND]).lstrip()


def _table(page_size: int, run: Sequence[Entry]) -> str:
    points = list(dict.fromkeys(entry.where for entry in run))
    cells = {(entry.contender, entry.where): _cell(entry) for entry in run}
    head = [f"pages of {page_size}", *(str(Point(*where)) for where in points)]
    names = _unique(run, "contender")
    return columns([head, *([name, *(cells.get((name, where), "") for where in points)] for name in names)])


def _unique(run: Sequence[Entry], field: str) -> list[Any]:
    return list(dict.fromkeys(getattr(entry, field) for entry in run))


def _cell(entry: Entry) -> str:
    if entry.microseconds is None:
        return entry.note.split(":")[0]
    share = "" if entry.share_of_copy is None else f" {entry.share_of_copy:.0%}"
    speedup = "" if entry.speedup is None else f" {entry.speedup:.2f}x"
    return f"{entry.microseconds:.1f}{share}{speedup} {entry.over_floor:.2f}f"


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows of text as a table: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def sensors() -> dict[str, str]:
    """Clocks in MHz, power in W and temperature of the GPU, now."""
    return dict(zip(SENSORS, _nvidia_smi(SENSORS), strict=True))


def environment(commit: str) -> dict[str, str]:
    """Date, machine, versions and commit."""
    gpu, driver = _nvidia_smi(("name", "driver_version"))
    installed = {str(package.name).lower(): package.version for package in distributions()}
    others = {name: installed[name] for name in ("vllm", "flashinfer-python", "triton") if name in installed}
    return others | {
        "date": date.today().isoformat(),
        "commit": commit,
        "gpu": gpu,
        "driver": driver,
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
    }


def document(commit: str, run: Sequence[Entry], **more: object) -> dict[str, object]:
    """The run as JSON."""
    return environment(commit) | more | {"definitions": DEFINITIONS, "entries": [asdict(entry) for entry in run]}


def _nvidia_smi(fields: Sequence[str]) -> list[str]:
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ["unknown"] * len(fields)
    return [value.strip() for value in line.split(",")]
