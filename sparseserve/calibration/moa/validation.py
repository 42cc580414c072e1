"""Plans compared as served: on other prompts, of a length that the search has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention, Hook
from sparseserve.calibration.chunks import Chunks
from sparseserve.calibration.moa.answers import Draw, answered, is_right, logits, loss
from sparseserve.calibration.moa.windows import keep
from sparseserve.calibration.subject import Subject
from sparseserve.types import Window

Windows = Sequence[Window]  # of the KV heads, layer by layer
Outcome = dict[str, float]


def validate(
    subject: Subject, draw: Draw, length: int, plans: Sequence[Windows | None], chunks: Chunks
) -> list[Outcome]:
    """The loss of every plan, over all prompts and of each kind, and its needle accuracy; None is dense attention."""
    hooks = [None if plan is None else served(plan) for plan in plans]

    @torch.no_grad()
    def measure(name: str) -> dict[str, Tensor]:
        sample = answered(subject, draw, name, length, "validation")
        scores = [logits(subject, sample, hook) for hook in hooks]
        return {
            "loss": torch.stack([loss(subject, sample, each) for each in scores]),
            "right": torch.tensor([is_right(subject, sample, each) for each in scores], dtype=torch.float64),
        }

    found = list(chunks.run(f"validate at {length}", draw.names, measure))
    needles, texts = found[::2], found[1::2]  # as Draw.names
    columns = {
        "loss": _mean(found, "loss"),
        "needle_loss": _mean(needles, "loss"),
        "text_loss": _mean(texts, "loss"),
        "needle_accuracy": _mean(needles, "right"),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def served(plan: Windows) -> Hook:
    """Decode steps that read the windows alone."""

    def attend(attention: Attention) -> Tensor:
        return attention.masked_output(keep(plan[attention.layer], attention.group))

    return attend


def _mean(chunks: Sequence[dict[str, Tensor]], key: str) -> list[float]:
    mean: list[float] = torch.stack([tensors[key].cpu() for tensors in chunks]).mean(0).tolist()
    return mean
