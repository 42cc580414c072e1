"""A MoA plan for a model: profile, search, validation (arXiv 2406.14909)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparseserve.artifacts import Artifact, save
from sparseserve.artifacts.moa import RUNTIME
from sparseserve.calibration.chunks import Chunks
from sparseserve.calibration.moa.answers import TEXT_TOKENS, Draw
from sparseserve.calibration.moa.profile import profile
from sparseserve.calibration.moa.search import Search, check_density
from sparseserve.calibration.moa.validation import Windows, validate
from sparseserve.calibration.moa.windows import MINIMUM, candidates, density, window
from sparseserve.calibration.samples import text_sha256
from sparseserve.calibration.subject import Subject
from sparseserve.errors import CalibrationError, Problem

Told = dict[str, Any]  # JSON-able


@dataclass(frozen=True, slots=True)
class Goal:
    """What to search for, and where to try it."""

    lengths: list[int]  # of the profile, tokens
    validate_length: int  # tokens
    density: list[float]  # at the lengths, one or one each; the last one holds at the validation's too

    @property
    def bounded(self) -> dict[int, float]:
        """The bound on the density at each length."""
        each = self.density * len(self.lengths) if len(self.density) == 1 else self.density
        return dict(zip(self.lengths, each, strict=True)) | {self.validate_length: each[-1]}

    def check(self, subject: Subject) -> None:
        """CalibrationError for lengths and densities that cannot be."""
        for key, length in [*(("--lengths", n) for n in self.lengths), ("--validate-length", self.validate_length)]:
            subject.check_length(key, length + TEXT_TOKENS)
            if length <= MINIMUM:
                raise CalibrationError(Problem(key, length, f"more than {MINIMUM} tokens, which every head reads"))
        if self.validate_length in self.lengths:
            allowed = "a length that is not profiled"
            raise CalibrationError(Problem("--validate-length", self.validate_length, allowed))
        if len(self.density) not in (1, len(self.lengths)) or not all(0 < bound <= 1 for bound in self.density):
            allowed = f"one share of the tokens above 0 and up to 1, or one for each of {len(self.lengths)} lengths"
            raise CalibrationError(Problem("--density", self.density, allowed))


@dataclass(frozen=True, slots=True)
class SearchedPlan:
    """One line alpha + beta N for each KV head."""

    alpha: Tensor  # [L, H] fp64 tokens
    beta: Tensor  # [L, H] fp64

    def windows(self, device: torch.device) -> Windows:
        """Its layers', as served."""
        lines = zip(self.alpha.to(device), self.beta.to(device), strict=True)
        return [window(alpha, beta) for alpha, beta in lines]

    def density(self, length: int) -> float:
        """Mean share of `length` tokens that a KV head reads, and so does each of its query heads."""
        return float(density(window(self.alpha.flatten(), self.beta.flatten()), length).mean())

    def artifact(self, subject: Subject) -> Artifact:
        """The plan as the policy loads it: alpha and beta of every query head."""
        heads = subject.shape.heads
        lines = {"alpha": self.alpha, "beta": self.beta}
        tensors = {name: line.repeat_interleave(heads.queries_per_kv, 1) for name, line in lines.items()}
        layers, count = tensors["alpha"].shape
        source = f"MoA plan, {layers} layers x {count} query heads, calibrated"
        return Artifact("moa", tensors, dict(RUNTIME), layers, count, source).resolve(subject.shape)


def calibrate(subject: Subject, goal: Goal, draw: Draw, output: Path, console: Console | None = None) -> Told:
    """Write the plan that validates best to `output`, the others beside it; everything measured, JSON-able.

    CalibrationError when the density cannot be reached, for lengths that the model does not take and for NaN.
    """
    goal.check(subject)
    alpha, beta = candidates(list(goal.bounded))
    windows = window(alpha, beta)
    densities = torch.stack([density(windows, length) for length in goal.bounded])
    check_density(densities, goal.bounded)

    used = subject.identity | {"lengths": list(goal.bounded), "draw": asdict(draw) | {"text": text_sha256(draw.text)}}
    on_device = window(alpha.to(subject.device), beta.to(subject.device))
    losses, dense = profile(subject, draw, goal.lengths, goal.validate_length, on_device, Chunks(output, used, console))
    search = Search(losses[:-1], losses[-1], densities, goal.bounded)
    choices, gap = search.pareto()
    plans = [SearchedPlan(alpha[choice], beta[choice]) for choice in choices]

    used["plans"] = [[plan.alpha.tolist(), plan.beta.tolist()] for plan in plans]
    chunks = Chunks(output, used, console)
    found = _compared(subject, goal, draw, plans, chunks)
    for told, choice in zip(found["plans"], choices, strict=True):
        told["masked_influence"] = dict(zip(goal.lengths, search.loss(choice).tolist(), strict=True))
    found["plans"] = _write(subject, plans, found["plans"], output)
    chunks.clear()
    profiled = dict(zip(goal.lengths, dense, strict=True))
    return found | {"candidates": len(alpha), "largest_gap": gap, "profiled_loss": profiled}


def _write(subject: Subject, plans: Sequence[SearchedPlan], told: Sequence[Told], output: Path) -> list[Told]:
    """Save the plans, the one of least loss as `output`; what is told of each, in this order, with its file."""
    ranked = sorted(zip(told, plans, strict=True), key=lambda pair: pair[0]["validation"]["loss"])
    files = [output, *(output.with_stem(f"{output.stem}-{place}") for place in range(2, len(plans) + 1))]
    for file, (_, plan) in zip(files, ranked, strict=True):
        save(plan.artifact(subject), file)
    return [{"file": file.name} | one for file, (one, _) in zip(files, ranked, strict=True)]


def _compared(subject: Subject, goal: Goal, draw: Draw, plans: Sequence[SearchedPlan], chunks: Chunks) -> Told:
    """Densities and outcomes of the plans, of the uniform window and of dense attention."""
    uniform = _uniform(plans, goal.validate_length)
    tried = [*plans, uniform]
    windows = [plan.windows(subject.device) for plan in tried]
    *outcomes, dense = validate(subject, draw, goal.validate_length, [*windows, None], chunks)
    told = [
        {"density": _densities(plan, list(goal.bounded)), "validation": outcome}
        for plan, outcome in zip(tried, outcomes, strict=True)
    ]
    return {"plans": told[:-1], "uniform": told[-1], "dense": {"validation": dense}}


def _densities(plan: SearchedPlan, lengths: Sequence[int]) -> dict[int, dict[str, float]]:
    """Shares of the tokens that are read; a KV head's query heads have its window, so both are the same."""
    return {length: dict.fromkeys(("per_query_head", "per_kv_head"), plan.density(length)) for length in lengths}


def _uniform(plans: Sequence[SearchedPlan], length: int) -> SearchedPlan:
    """The window of no fewer tokens than any of the plans reads at this length, the same for all heads."""
    share = max(plan.density(length) for plan in plans)
    return SearchedPlan(torch.zeros_like(plans[0].alpha), torch.full_like(plans[0].beta, share))
