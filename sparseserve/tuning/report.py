"""The HTML report of a tuning: one file, with its pictures and, beside every number, the command that measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparseserve.artifacts import load
from sparseserve.evaluation.results import Results
from sparseserve.files import write_atomically
from sparseserve.tuning import pictures
from sparseserve.tuning.judge import INFORMATIVE, Judged, Objective, Verdict, longest

OWN = "vLLM's own attention"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Everything that was asked and found."""

    model: str
    objective: Objective
    max_loss: float
    command: str  # tunes again
    baseline: Judged  # vLLM's own attention, first
    again: Judged  # the same, last
    noise: float  # by how much their times differ, as a share
    judged: list[Judged]
    untried: dict[str, str]  # setting -> why it was not measured
    verdict: Verdict
    measured: Results  # for its date, versions and seed


def write_report(tuning: Tuning, path: Path) -> None:
    """Write the report; raises FileError."""
    write_atomically(path, render(tuning).encode())


def render(tuning: Tuning) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("sparseserve.tuning", "."), autoescape=True, undefined=StrictUndefined
    )
    length = longest(tuning.baseline.result).length
    return environment.get_template("report.html.j2").render(
        tuning=tuning,
        length=length,
        informative=INFORMATIVE,
        settings=[tuning.baseline, *tuning.judged, tuning.again],
        fronts=_fronts(tuning, length),
        grids=_grids({OWN: tuning.baseline, **{one.name: one for one in tuning.judged}}),
        own=OWN,
        texts=tuning.baseline.loss.bits is not None,
        maps=_maps(tuning.judged, length),
        recall=pictures.recall_by_layer(tuning.judged),
    )


def _fronts(tuning: Tuning, length: int) -> dict[str, str]:
    """Pareto fronts by title."""
    times = [one.ms_per_token for one in tuning.judged]
    reference, fronts = tuning.baseline.ms_per_token, {}
    if reference is not None and None not in times:
        cost = [time or 0.0 for time in times]
        fronts["Quality against time"] = pictures.pareto_front(
            tuning.judged, cost, reference, f"ms per token at {length} tokens"
        )
    read = [100 * one.density for one in tuning.judged]
    fronts["Quality against KV read"] = pictures.pareto_front(
        tuning.judged, read, 100.0, f"share of the KV cache read at {length} tokens, %"
    )
    return fronts


def _grids(judged: Mapping[str, Judged]) -> dict[str, dict[str, str]]:
    """Needle grids by task, then by setting."""
    tasks = dict.fromkeys(cell.task for one in judged.values() for cell in one.result.cells)
    grids = {
        task: {name: grid for name, one in judged.items() if (grid := pictures.needle_grid(one.result, task))}
        for task in tasks
    }
    return {task: found for task, found in grids.items() if found}


def _maps(judged: Sequence[Judged], length: int) -> dict[str, str]:
    """Layer x head maps of the artifacts that were served."""
    files = dict.fromkeys(str(one.result.values["artifact"]) for one in judged if "artifact" in one.result.values)
    return {file: found for file in files if (found := pictures.layer_head_map(load(file), length))}
