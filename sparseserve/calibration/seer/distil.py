"""Distillation of decode gates: documents, training, what the gates hold of the attention mass of held-out text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparseserve.calibration.chunks import Chunks, Tensors
from sparseserve.calibration.seer.data import Documents
from sparseserve.calibration.seer.gate import Gates
from sparseserve.calibration.seer.recall import held
from sparseserve.calibration.seer.rope import rotations
from sparseserve.calibration.seer.training import Losses, Training
from sparseserve.calibration.subject import Subject
from sparseserve.errors import CalibrationError, Problem

CHOOSERS = ("gate", "block_max", "mean_key", "random")  # block_max is what the gates were trained to tell


@dataclass(frozen=True, slots=True)
class Recipe:
    """How gates are made and trained."""

    steps: int
    rate: float  # AdamW's largest learning rate
    gate_dim: int  # E
    qk_norm: bool
    rope: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Distilled:
    """Gates whose weights are rounded to bfloat16, as they are served, and what they came to."""

    gates: Gates
    losses: Losses
    recall: dict[str, Tensor]  # [L, H] of every chooser; oracle_mass and earlier_mass, the attention at stake


def distil(subject: Subject, chunks: Chunks, documents: Documents, recipe: Recipe) -> Distilled:
    """Train gates for every layer; CalibrationError or UnsupportedError where that cannot be."""
    documents.check(subject)
    if recipe.gate_dim % 16 or recipe.gate_dim > 256:
        raise CalibrationError(Problem("--gate-dim", recipe.gate_dim, "a multiple of 16 up to 256", remedy="give 128"))
    unrope, rope = rotations(subject, max(documents.lengths), recipe.gate_dim)
    for part in ("held-out", "train"):
        documents.collect(subject, chunks, part, unrope)
    shape = subject.shape
    gates = Gates(shape.layers, shape.heads, recipe.gate_dim, recipe.qk_norm, documents.seed).to(subject.device)
    training = Training(gates, documents, chunks, rope if recipe.rope else None)
    losses = training.run(recipe.steps, recipe.rate)
    for weight in gates.parameters():
        weight.data = weight.data.bfloat16().float()
    return Distilled(gates, losses, _recall(training, documents, chunks))


@torch.no_grad()
def _recall(training: Training, documents: Documents, chunks: Chunks) -> dict[str, Tensor]:
    """The recall [L, H] of every chooser over the held-out documents, and the share of attention that is at stake."""
    totals: dict[str, Tensor] = {}
    rows = 0
    for name in documents.names("held-out"):
        chunk = chunks.load("held-out", name)
        rows += len(chunk["rows"])
        for key, mass in _held(training, documents, chunk).items():
            totals[key] = totals.get(key, torch.zeros(())) + mass
    recall = {name: totals[name] / totals["oracle"].clamp(min=torch.finfo().tiny) for name in CHOOSERS}
    return recall | {"oracle_mass": totals["oracle"] / rows, "earlier_mass": totals["earlier"] / rows}


def _held(training: Training, documents: Documents, chunk: Tensors) -> dict[str, Tensor]:
    mass, rows = chunk["mass"], chunk["rows"]
    scores = {
        "oracle": mass,
        "gate": training.shares(chunk).cpu(),
        "block_max": chunk["target"].float(),
        "mean_key": chunk["mean_key"],
        "random": torch.rand(mass.shape, generator=torch.Generator().manual_seed(documents.seed)),
    }
    return {name: held(score, mass, rows, documents.block) for name, score in scores.items()} | {
        "earlier": mass.sum((1, 3))
    }


def results(distilled: Distilled) -> dict[str, Any]:
    """What the report says, JSON-able."""
    losses = distilled.losses
    return {
        "loss": {
            "train": losses.train,
            "held_out_steps": losses.steps,
            "held_out": losses.held_out.sum(1).tolist(),
            "held_out_layers": losses.held_out.T.tolist(),
        },
        "recall": {name: _per_layer(distilled, name) for name in CHOOSERS},
        "recall_heads": {name: distilled.recall[name].tolist() for name in CHOOSERS},
        "oracle_mass": distilled.recall["oracle_mass"].mean(1).tolist(),
        "oracle_mass_heads": distilled.recall["oracle_mass"].tolist(),
        "earlier_mass_heads": distilled.recall["earlier_mass"].tolist(),
    }


def _per_layer(distilled: Distilled, name: str) -> list[float]:
    """Summed over the heads before it is divided."""
    oracle = distilled.recall["oracle_mass"]
    return ((distilled.recall[name] * oracle).sum(1) / oracle.sum(1).clamp(min=torch.finfo().tiny)).tolist()
