"""The windows that a MoA plan (arXiv 2406.14909) can give a KV head, as policies/moa.py serves them.

All query heads of a KV head get the same line alpha + beta N: the server reads the longest of a group for each of them,
so that a shorter one would save nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseserve.artifacts.moa import RUNTIME
from sparseserve.types import Window

SINK, MINIMUM, PAGE = RUNTIME["sink"], RUNTIME["minimum"], RUNTIME["granularity"]  # tokens
BETAS = 8  # steps up to 1, as in MoA


def window(alpha: Tensor, beta: Tensor) -> Window:
    """The window of lines alpha [Hs] tokens and beta [Hs], both fp64, on pages of 64 tokens."""
    sink = torch.full(alpha.shape, SINK, dtype=torch.int32, device=alpha.device)
    return Window(sink, alpha[..., None], beta[..., None], MINIMUM, PAGE)


def candidates(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """alpha [C] and beta [C] fp64 of all lines that differ at one of the lengths.

    As in MoA, beta goes by eighths and alpha by half the shortest length, such that a line spans something at the
    shortest length and not more than everything at the longest; one spans the minimum, one everything.
    """
    shortest, longest = min(lengths), max(lengths)
    step = max(PAGE, shortest // 2 // PAGE * PAGE)
    alphas = torch.arange(-(longest // step), longest // step + 1) * step
    betas = torch.arange(BETAS + 1) / BETAS
    alpha, beta = torch.cartesian_prod(alphas.double(), betas.double()).T
    sensible = (alpha + beta * shortest >= 0) & (alpha + beta * longest <= longest)
    alpha, beta = alpha[sensible], beta[sensible]
    served = torch.stack([density(window(alpha, beta), length) for length in lengths], -1)
    first = sorted({tuple(row): index for index, row in reversed(list(enumerate(served.tolist())))}.values())
    return alpha[first], beta[first]


def density(window: Window, length: int) -> Tensor:
    """Share [Hs] fp64 of `length` tokens that are read in the step of the last of them."""
    sink, start = window.spans(torch.tensor(length, device=window.sink.device)).unbind(-1)
    return 1 - (start - sink).clamp(min=0).double() / length


def keep(window: Window, group: int) -> Callable[[int, int], Tensor]:
    """What `Attention.masked_output` asks for: the tokens [Hq, last - first, last] bool that a decode step reads."""

    def kept(first: int, last: int) -> Tensor:
        device = window.sink.device
        lengths = torch.arange(first + 1, last + 1, device=device)
        sink, start = window.spans(lengths).permute(2, 1, 0)[..., None]  # each [Hs, R, 1]
        tokens = torch.arange(last, device=device)
        read: Tensor = (tokens < sink) | (tokens >= start)
        return read.repeat_interleave(group, 0)

    return kept
