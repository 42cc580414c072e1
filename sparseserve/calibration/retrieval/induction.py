"""Which heads look back to what followed the same place, or to that place itself (RazorAttention, arXiv 2407.15891)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseserve.calibration.attention import ROWS, Attention, hooked
from sparseserve.calibration.retrieval.copying import MAJORITY
from sparseserve.calibration.subject import Subject

REPEATS = 4  # of the same random tokens, as in Huawei's implementations
MOST_BLOCKS = 4  # of ROWS rows that are looked at in each repeat: shares are exact to 0.03, one standard deviation


def earlier(first: int, last: int, begin: int, size: int) -> Tensor:
    """Where rows first to last - 1 of a block of `size` tokens, repeated from `begin` on, find its earlier occurrences.

    [2, last - first, last] bool: induction, the tokens that followed the row's place in the block; echo, that place.
    """
    key, row = torch.arange(last), torch.arange(first, last)[:, None]
    back = torch.stack([row + 1 - key, row - key])
    return (back % size == 0) & (key < row) & (key >= begin)


def mass_on(weights: Tensor, wanted: Tensor) -> Tensor:
    """The mass [2, Hq, R] of weights [Hq, R, T] on what `earlier` [2, R, T] marks."""
    return torch.einsum("hrt,krt->khr", weights, wanted.to(weights))


@torch.no_grad()
def induction(subject: Subject, ids: list[int], begin: int) -> dict[str, Tensor]:
    """Scores from one pass over `ids`, which are `REPEATS` times the same tokens from position `begin` on.

    `mass` [2, L, Hq] fp64 are the published induction and echo scores: the mean mass on all earlier occurrences.
    `share` [2, L, Hq] fp64 is the share of the second repeat's rows with the majority of the mass on the one earlier
    occurrence. The mean does not tell a head that copies every seventh token from one that looks at each with a
    seventh of its attention and copies none; and three occurrences give a faint head three chances.
    """
    size = (len(ids) - begin) // REPEATS
    found: list[Tensor] = []

    def look(attention: Attention) -> None:
        rows = _blocks(begin, size)
        found.append(
            torch.cat([mass_on(attention.weights(*row), earlier(*row, begin, size)) for row in rows], -1).cpu()
        )

    with hooked(look):
        subject.model(subject.tensor(ids), use_cache=False, logits_to_keep=1)
    mass = torch.stack(found, 1).double()
    second = mass[..., : mass.shape[-1] // (REPEATS - 1)]
    return {"mass": mass.mean(-1), "share": (second > MAJORITY).double().mean(-1)}


def _blocks(begin: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows, evenly spread and as many in each repeat but the first."""
    for start in range(begin + size, begin + REPEATS * size, size):
        for first in range(start, start + size, max(ROWS, -(-size // MOST_BLOCKS))):
            yield first, min(first + ROWS, start + size)
