"""Which heads copy a needle into the answer (Retrieval_Head, arXiv 2404.15574, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention
from sparseserve.calibration.samples import Needle, answer
from sparseserve.calibration.subject import Subject

MAJORITY = 0.5  # of the attention mass


@dataclass(frozen=True, slots=True)
class Trace:
    """Where every head looks most in the decode steps that gave an answer."""

    position: Tensor  # [S, L, Hq] int64, the token with the largest attention mass
    mass: Tensor  # [S, L, Hq] fp32, that mass
    answer: Tensor  # [S] int64, the token that each step gave
    right: bool  # whether the answer holds the value


def trace(subject: Subject, question: Needle) -> Trace:
    """Let the model answer and look at each step."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(attention: Attention) -> None:
        mass, position = attention.weights(attention.start, attention.start + 1)[:, 0].max(-1)
        seen.append((position.cpu(), mass.cpu()))

    tokens, right = answer(subject, question, look)
    steps = -1, subject.shape.layers, subject.shape.heads.query_heads
    position, mass = (torch.stack(part).view(steps) for part in zip(*seen, strict=True))
    return Trace(position[: len(tokens)], mass[: len(tokens)], torch.tensor(tokens, dtype=torch.int64), right)


def copied(trace: Trace, question: Needle, least_mass: float = 0.0) -> Tensor:
    """The share [L, Hq] fp64 of the value's tokens that each head copies: the copy score of one answer.

    A head copies a token if it looks there most in the step that gives the same token, with more than `least_mass` of
    its attention. The paper asks for no mass (`least_mass` = 0). Ours asks for `MAJORITY`: with less, most of what the
    head returns is something else, and it points at the token without copying it. (Such heads serve to select by, not
    to answer by.) The paper's needle is a sentence; ours is the value, which alone must be found. None counts twice.
    """
    value = torch.tensor([question.ids[position] for position in question.value])
    place = trace.position - question.value.start
    inside = (place >= 0) & (place < len(value))
    same = value[place.clamp(0, len(value) - 1)] == trace.answer[:, None, None]
    place = torch.where(inside & same & (trace.mass > least_mass), place, len(value))  # the last: not copied
    found = torch.zeros(len(value) + 1, *place.shape[1:], dtype=torch.float64).scatter_(0, place, 1.0)
    return found[:-1].mean(0)
