"""Made-up measurements, where only the rules are under test."""

from __future__ import annotations

from collections.abc import Sequence

from sparseserve.evaluation.evaluation import Setting
from sparseserve.evaluation.results import AtLength, Cell, Results, SettingResult
from sparseserve.tuning.judge import Judged, longest, loss


class Lab:
    """Makes results of a policy: scores by task, times, texts."""

    def setting(
        self,
        policy: str,
        scores: dict[str, Sequence[float]],
        ms: float = 10.0,
        density: float = 0.2,
        bits: float | None = None,
        **values: object,
    ) -> SettingResult:
        cells = [
            Cell(
                task=task, length=length, depth=depth, asked=len(given), scores=list(given),
                score=sum(given) / len(given), low=0.0, high=1.0, command=f"eval {policy} {task} {length}",
            )
            for task, given in scores.items()
            for length in (2048, 8192)
            for depth in (0.1, 0.9)
        ]  # fmt: skip
        lengths = [
            AtLength(
                length=length, density=density, ms_per_token=ms * length / 8192, timed_tokens=32,
                recall=[0.9, 0.8, 0.95], bits_per_byte=bits, scored_bytes=256, command=f"eval {policy} {length}",
            )
            for length in (2048, 8192)
        ]  # fmt: skip
        return SettingResult(policy=policy, values=values, command=f"eval {policy}", lengths=lengths, cells=cells)

    def judged(self, result: SettingResult, baseline: SettingResult, stored: float = 100.0) -> Judged:
        at, before = longest(result), longest(baseline)
        assert at.ms_per_token is not None and before.ms_per_token is not None and at.density is not None
        speedup = before.ms_per_token / at.ms_per_token
        lost = loss(result, baseline)
        pairs = tuple(f"{key}={value}" for key, value in result.values.items())
        return Judged(
            Setting(policy=result.policy, pairs=pairs),
            result,
            lost,
            at.ms_per_token,
            speedup,
            at.density,
            stored,
            at.recall,
        )

    def results(self, settings: list[SettingResult]) -> Results:
        return Results(
            model="some/model", config_sha256="0" * 64, command="eval", seed=0, date="2026-01-01T00:00:00+00:00",
            versions={"torch": "2"}, settings=settings,
        )  # fmt: skip
