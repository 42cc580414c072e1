"""What a setting loses against dense attention, question by question, and which setting to serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scipy.stats import binomtest

from sparseserve.errors import Problem, TuningError
from sparseserve.evaluation.evaluation import Setting
from sparseserve.evaluation.results import AtLength, Cell, SettingResult

Objective = Literal["latency", "memory"]
INFORMATIVE = 0.5  # a cell tells something of a policy where dense attention scores at least this
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Loss:
    """Quality lost against dense attention, on the questions that dense attention can answer."""

    score: float  # mean drop of the score, 0 to 1; negative where the policy did better
    worse: int  # questions answered worse
    questions: int
    bound: float  # of worse / questions, upper end of its one-sided 95 % interval (Clopper-Pearson)
    bits: float | None  # relative rise of the bits per byte, mean over lengths; None without a text

    @property
    def value(self) -> float:
        """What `--max-loss` bounds: the larger of the two."""
        return max(self.score, self.bits or 0.0)


@dataclass(frozen=True, slots=True)
class Judged:
    """A measured setting beside the baseline."""

    setting: Setting
    result: SettingResult
    loss: Loss
    ms_per_token: float | None  # at the longest length
    speedup: float | None  # baseline's time / this
    density: float  # share of the KV tokens read at the longest length
    stored: float  # bytes of the cache per token at the longest length, keys, values and summaries
    recall: list[float] | None  # [L] at the longest length

    @property
    def name(self) -> str:
        """`quest budget_tokens=512`; of a file its name without the folder."""
        values = {key: Path(value).name if key == "artifact" else value for key, value in self.result.values.items()}
        return " ".join([self.result.policy, *(f"{key}={value}" for key, value in values.items())])

    @property
    def recall_shared(self) -> bool:
        """Whether recall was measured with kv_memory=shared, because the setting frees what recall is against."""
        return self.recall is not None and self.setting.load().frees_pages


@dataclass(frozen=True, slots=True)
class Verdict:
    """The setting to serve, or why there is none."""

    chosen: Judged | None
    reason: str


def loss(result: SettingResult, baseline: SettingResult) -> Loss:
    """The loss of a setting; TuningError if it was not asked what the baseline was asked, or nothing informative."""
    own = {_place(cell): cell for cell in result.cells}
    pairs = [(cell, own.get(_place(cell))) for cell in baseline.cells if cell.score >= INFORMATIVE]
    if not pairs and not _texts(result, baseline):
        scores = ", ".join(f"{cell.task} at {cell.length}: {cell.score:.2f}" for cell in baseline.cells) or "none"
        allowed = f"at least {INFORMATIVE} on some task, or a text"
        remedy = "give --tasks that the model can answer, shorter --lengths, or --text FILE"
        raise TuningError(Problem("score of dense attention", scores, allowed, remedy=remedy))
    drops = [drop for dense, cell in pairs for drop in _drops(dense, cell, result)]
    worse = sum(drop > 0 for drop in drops)
    bound = binomtest(worse, len(drops)).proportion_ci(2 * CONFIDENCE - 1, "exact").high if drops else 1.0
    rises = [after / before - 1 for after, before in _texts(result, baseline)]
    return Loss(
        score=sum(drops) / len(drops) if drops else 0.0,
        worse=worse,
        questions=len(drops),
        bound=float(bound),
        bits=sum(rises) / len(rises) if rises else None,
    )


def choose(judged: Sequence[Judged], baseline: Judged, objective: Objective, max_loss: float, noise: float) -> Verdict:
    """The best setting that was measured whole and loses at most `max_loss`; the baseline where none beats it.

    `noise` is by how much two measurements of the baseline's time differ, as a share: a smaller gain counts as none.
    """
    measured = [one for one in judged if one.speedup is not None and one.loss.value <= max_loss]
    if objective == "latency":
        faster = [one for one in measured if one.speedup is not None and one.speedup > 1 + noise]
        if not faster:
            return Verdict(None, f"no setting within {max_loss:.1%} is faster than vLLM beyond the noise ({noise:.1%})")
        best = max(faster, key=lambda one: (one.speedup or 0, -one.density))
        return Verdict(best, f"the fastest of {len(faster)} faster settings that lose at most {max_loss:.1%}")
    smaller = [one for one in measured if (one.stored, one.density) < (baseline.stored, baseline.density)]
    if not smaller:
        return Verdict(None, f"no setting within {max_loss:.1%} stores less than vLLM, or as much and reads less")
    best = min(smaller, key=lambda one: (one.stored, one.density))
    return Verdict(best, f"stores least, then reads least, of {len(smaller)} settings that lose at most {max_loss:.1%}")


def pareto(judged: Sequence[Judged], cost: Sequence[float]) -> list[bool]:
    """Which settings no other one beats in both loss and cost."""

    def beaten(index: int) -> bool:
        mine = (judged[index].loss.value, cost[index])
        others = ((other.loss.value, cost[i]) for i, other in enumerate(judged) if i != index)
        return any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)

    return [not beaten(index) for index in range(len(judged))]


def longest(result: SettingResult) -> AtLength:
    """The numbers at the longest length."""
    return max(result.lengths, key=lambda at: at.length)


def _place(cell: Cell) -> tuple[str, int, float | None]:
    return cell.task, cell.length, cell.depth


def _drops(dense: Cell, cell: Cell | None, result: SettingResult) -> list[float]:
    if cell is None or cell.asked != dense.asked:
        asked = 0 if cell is None else cell.asked
        where = f"{result.policy}, {dense.task} at {dense.length}"
        remedy = "measure it again"
        raise TuningError(Problem("questions", asked, f"{dense.asked}, as dense attention", remedy=remedy, where=where))
    return [before - after for before, after in zip(dense.scores, cell.scores, strict=True)]


def _texts(result: SettingResult, baseline: SettingResult) -> list[tuple[float, float]]:
    before = {at.length: at.bits_per_byte for at in baseline.lengths}
    pairs = ((at.bits_per_byte, before.get(at.length)) for at in result.lengths)
    return [(own, dense) for own, dense in pairs if own is not None and dense]
