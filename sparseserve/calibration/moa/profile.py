"""How much the loss would change if a decode step did not read a token: MoA's first-order influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from sparseserve.calibration.attention import ROWS, Attention
from sparseserve.calibration.chunks import Chunks
from sparseserve.calibration.moa.answers import Answered, Draw, answered, logits, loss
from sparseserve.calibration.moa.windows import PAGE
from sparseserve.calibration.subject import Subject
from sparseserve.types import Window


def profile(
    subject: Subject, draw: Draw, lengths: Sequence[int], beyond: int, candidates: Window, chunks: Chunks
) -> tuple[Tensor, list[float]]:
    """The influence that each candidate masks [K + 1, L, H, C] fp64, and the loss [K]; means over samples.

    The last is a guess at the length `beyond`: the longest's influence, stretched.
    """
    names = [f"{length} {name}" for length in lengths for name in draw.names]

    def measure(name: str) -> dict[str, Tensor]:
        length, prompt = name.split()
        sample = answered(subject, draw, prompt, int(length), "profile")
        masked, value = masked_influence(subject, sample, candidates, (1, beyond / int(length)))
        return {"loss": value, "influence": masked}

    found = list(chunks.run("profile", names, measure))
    shape = (len(lengths), len(draw.names))
    masked = torch.stack([tensors["influence"].cpu() for tensors in found])
    losses = torch.stack([tensors["loss"].cpu() for tensors in found])
    measured, stretched = masked.view(*shape, *masked.shape[1:]).mean(1).unbind(1)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return torch.cat([measured, stretched[longest, None]]), losses.view(shape).mean(1).tolist()


def masked_influence(
    subject: Subject, sample: Answered, candidates: Window, stretches: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """What each candidate would mask of a sample's influence [S, L, H, C] fp64, sum over a KV head's group; the loss.

    Only the rows of decode steps count, for the prompt is prefilled densely. A stretch of 2 takes the windows at twice
    the length, and the influence at the same relative position.
    """
    outputs, value = gradients(subject, sample)
    return torch.stack(
        [_masked(attention, gradient, candidates, stretches) for attention, gradient in outputs], 1
    ), value


def gradients(subject: Subject, sample: Answered) -> tuple[list[tuple[Attention, Tensor]], Tensor]:
    """The attention of every layer in the answer's rows with dL/dO [Hq, A, D] of its output, and the loss.

    What attention makes on the way is computed again in the backward pass, so it exists for one layer at a time.
    """
    seen: list[tuple[Attention, Tensor]] = []

    def watch(attention: Attention) -> Tensor:
        output: Tensor = checkpoint(attention.output, use_reentrant=False)
        if not output.requires_grad:  # of the first layer: weights have no gradients
            output.requires_grad_()
        output.retain_grad()
        seen.append((attention, output))
        return output

    value = loss(subject, sample, logits(subject, sample, watch))
    torch.autograd.backward(value)
    return [
        (_detached(attention), output.grad) for attention, output in seen if output.grad is not None
    ], value.detach()


def influence(attention: Attention, gradient: Tensor, first: int, last: int) -> Tensor:
    """E_ij = |A_ij (g_ij - sum_k g_ik A_ik) / (1 - A_ij)| [Hq, last - first, last] fp32 of rows first to last - 1.

    A are the attention weights, g = dL/dA = dL/dO V^T, `gradient` is dL/dO [Hq, Tq, D]: the loss changes so much, to
    first order in the output, when row i is renormalised without token j (MoA, modify_llama_profile.py). For the token
    of the largest weight, where both differences may round to 0, the quotient is g_ij less the mean of g under the
    weights of the others; a row of one token has no others and gets |g A|, as in MoA.
    """
    rows = gradient[:, first - attention.start : last - attention.start].float()
    values = attention.value[:, :last].float().repeat_interleave(attention.group, 0)
    scores = attention.logits(first, last)
    weights, top = scores.softmax(-1), scores.argmax(-1, keepdim=True)
    others = scores.scatter(-1, top, -torch.inf).softmax(-1).nan_to_num()  # NaN: a row of one token
    slope = rows @ values.mT
    change = (slope - (weights * slope).sum(-1, keepdim=True)) / (1 - weights.scatter(-1, top, 0))  # at least 1/2
    of_top = slope.gather(-1, top) - (others * slope).sum(-1, keepdim=True)
    found: Tensor = weights * change.scatter(-1, top, of_top)
    return found.abs_()


def _detached(attention: Attention) -> Attention:
    tensors = {name: getattr(attention, name).detach() for name in ("query", "key", "value")}
    return replace(attention, **tensors)


def _masked(attention: Attention, gradient: Tensor, candidates: Window, stretches: Sequence[float]) -> Tensor:
    """Influence [S, H, C] fp64 of the tokens that each candidate's decode steps do not read."""
    end, total = attention.key.shape[1], torch.zeros(())
    for first in range(attention.start, end, ROWS):
        last = min(first + ROWS, end)
        pages = _by_page(influence(attention, gradient, first, last)).cumsum(-1)
        lengths = torch.arange(first + 1, last + 1, device=pages.device)
        masked = []
        for stretch in stretches:
            start = candidates.spans((lengths * stretch).long())[..., 1] / stretch  # [R, C]
            before = (start.long() // PAGE - 1).clamp(min=0).expand(len(pages), -1, -1)
            masked.append(pages.gather(-1, before).sum(1))
        total = total.to(pages) + torch.stack(masked)
    heads: Tensor = total.view(len(stretches), -1, attention.group, total.shape[-1])
    return heads.sum(2)


def _by_page(influence: Tensor) -> Tensor:
    """Sums over pages [Hq, R, N] fp64 of [Hq, R, T]; 0 for the first one, the sink, which is always read."""
    filled = pad(influence, (0, -influence.shape[-1] % PAGE))
    pages = filled.view(*filled.shape[:-1], -1, PAGE).double().sum(-1)
    pages[..., 0] = 0
    return pages
