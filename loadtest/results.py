"""What a load test found: the contents of results.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loadtest.metrics import Observed
from loadtest.scenario import Scenario
from loadtest.statistics import Accuracy, Comparison, Estimate

Role = Literal["control", "again", "policy"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Record):
    """One setting at one load, over all repeats."""

    load: str
    sent: int  # requests
    completed: int  # with as many tokens as they should have
    right: int | None  # answers that are right; None where that is not known
    estimates: dict[str, Estimate]  # by metric: latencies in ms, rates a second
    observed: Observed
    files: list[str]  # of the runs, beside results.json; the samples of /metrics lie beside each
    commands: list[str]  # run each again, against the setting's server


class SettingResult(_Record):
    """A policy in a server of its own."""

    name: str
    role: Role
    policy: str
    values: dict[str, Any]
    serve: str  # starts its server
    cells: list[Cell]
    comparisons: list[Comparison]  # with the control; empty for the control itself
    problems: list[str]  # why it is flagged
    accuracy: Accuracy | None  # of the answers at all loads, or from --eval

    def cell(self, load: str) -> Cell:
        """The cell of a load."""
        return next(cell for cell in self.cells if cell.load == load)


class Results(_Record):
    """results.json."""

    scenario: Scenario
    model: str
    command: str  # runs everything again
    date: str  # UTC, ISO 8601
    versions: dict[str, str]
    machine: str
    order: list[str]  # in which the settings ran
    evaluated: str | None  # the file of --eval
    settings: list[SettingResult]  # control, control again, then as asked for
    flagged: list[str]  # names of those that something is wrong with
