"""A whole tuning: measure, judge, choose, measure the baseline again; what was measured survives a kill."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import yaml

from sparseserve.errors import FileError, Problem, TuningError
from sparseserve.evaluation.evaluation import Evaluation, Setting
from sparseserve.evaluation.results import Results, SettingResult
from sparseserve.evaluation.run import Progress, evaluate, partial_file
from sparseserve.files import write_atomically
from sparseserve.tuning.judge import Judged, Objective, choose, longest, loss, pareto
from sparseserve.tuning.report import Tuning
from sparseserve.tuning.search import descend, families, fitting, judge

OWN_ATTENTION = Setting(policy="dense", pairs=(f"min_tokens={2**31 - 1}",))  # rows of every length are vLLM's
MEASURED, AGAIN = "measured.json", "again.json"

Evaluate = Callable[[Evaluation, Path, Progress], Results]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be tuned: the settings of `request` are the candidates."""

    request: Evaluation
    objective: Objective
    max_loss: float  # 0 to 1
    command: str  # tunes again


def tune(asked: Asked, folder: Path, progress: Progress, evaluate: Evaluate = evaluate) -> Tuning:
    """Measure candidates beside vLLM's own attention and choose one.

    `folder` keeps the measurements, so that a killed run goes on where it was. Raises TuningError where nothing that
    was measured tells which policy is best.
    """
    request = asked.request
    stored, untried = fitting([OWN_ATTENTION, *request.settings], request.model, request.vllm, max(request.lengths))
    candidates = [setting for setting in request.settings if setting in stored]
    if not candidates:
        raise TuningError(*untried.values())
    lab = _Lab(request, folder, progress, evaluate)
    own = lab.measure(OWN_ATTENTION)
    baseline = judge(OWN_ATTENTION, own, own, stored[OWN_ATTENTION], loss(own, own))
    judged: list[Judged] = []
    for family in families(candidates):
        tried = descend(family, own, stored, asked.max_loss, lab.measure)
        judged += tried
        untried |= {str(one): "a larger budget already loses too much" for one in family[len(tried) :]}
    again = judge(OWN_ATTENTION, lab.time_again(own), own, baseline.stored, baseline.loss)
    noise = abs((again.speedup or 1.0) - 1)
    pick = partial(choose, baseline=baseline, objective=asked.objective, max_loss=asked.max_loss, noise=noise)
    judged = lab.with_recall(judged, asked.max_loss, pick(judged).chosen)
    return Tuning(
        model=request.model,
        objective=asked.objective,
        max_loss=asked.max_loss,
        command=asked.command,
        baseline=baseline,
        again=again,
        noise=noise,
        judged=judged,
        untried=untried,
        verdict=pick(judged),
        measured=lab.last,
    )


def write_policy(tuning: Tuning, path: Path) -> None:
    """Write the policy file that `sparseserve serve --policy` reads; TuningError without a choice."""
    chosen = tuning.verdict.chosen
    if chosen is None:
        remedy = "allow more --max-loss, or give other --policies and --budgets"
        raise TuningError(Problem("recommendation", "none", tuning.verdict.reason, remedy=remedy))
    worse = f"{chosen.loss.worse} of {chosen.loss.questions} questions answered worse than by dense attention"
    about = [f"{tuning.verdict.reason}; {worse}", f"measured {tuning.measured.date} by {tuning.command}"]
    entry = {"policy": chosen.result.policy, **chosen.result.values}
    content = yaml.safe_dump({"models": {glob.escape(tuning.model): entry}}, sort_keys=False)
    write_atomically(path, ("".join(f"# {line}\n" for line in about) + content).encode())


@dataclass(slots=True)
class _Lab:
    """Measures a setting at a time; all of it is kept in the same journal."""

    request: Evaluation
    folder: Path
    progress: Progress
    evaluate: Evaluate
    last: Results = field(init=False)

    def measure(self, setting: Setting) -> SettingResult:
        """Scores and times, without recall, which needs a server of its own.

        What an earlier run did not measure has to come before the second measurement of the baseline.
        """
        before = self._kept()
        result = self._ask(MEASURED, settings=(setting,), recall=False)
        if self._kept() != before:
            partial_file(self.folder / AGAIN).unlink(missing_ok=True)
        return result

    def time_again(self, own: SettingResult) -> SettingResult:
        """The baseline's time at the longest length, from some of its questions."""
        length = longest(own).length
        task = next(cell.task for cell in own.cells if cell.length == length)
        return self._ask(AGAIN, settings=(OWN_ATTENTION,), tasks=(task,), lengths=(length,), recall=False)

    def with_recall(self, judged: Sequence[Judged], max_loss: float, chosen: Judged | None) -> list[Judged]:
        """Measures the attention mass that the best settings keep: the chosen one, and those within the loss that no
        other one beats."""
        front = pareto(judged, [one.density for one in judged])
        best = [one is chosen or (on and one.loss.value <= max_loss) for one, on in zip(judged, front, strict=True)]
        return [self._recall(one) if good else one for one, good in zip(judged, best, strict=True)]

    def _recall(self, one: Judged) -> Judged:
        result = self._ask(MEASURED, settings=(one.setting,), recall=True)
        return replace(one, result=result, recall=longest(result).recall)

    def _ask(self, name: str, **changes: object) -> SettingResult:
        request = self.request.model_copy(update=changes)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            remedy = f"check --output ({error.strerror})"
            raise FileError(Problem("folder", self.folder, "a folder that can be made", remedy=remedy)) from None
        self.last = self.evaluate(request, self.folder / name, self.progress)
        return self.last.settings[0]

    def _kept(self) -> int:
        """Bytes of what is measured."""
        file = partial_file(self.folder / MEASURED)
        return file.stat().st_size if file.is_file() else 0
