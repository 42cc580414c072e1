"""Induction and echo scores on attention made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseserve.calibration.retrieval.induction import REPEATS, earlier, mass_on

BEGIN, SIZE = 1, 5
END = BEGIN + REPEATS * SIZE


def looking_at(first: int, last: int, back: int, mass: float = 1.0) -> Tensor:
    """Weights [1, R, T] of a head that looks `back` tokens back with some of its mass, else at token 0."""
    weights = torch.zeros(1, last - first, last)
    for row, position in enumerate(range(first, last)):
        weights[0, row, position - back] = mass
        weights[0, row, 0] += 1 - mass
    return weights


@pytest.mark.parametrize("occurrence", [1, 2])
@pytest.mark.parametrize(
    ("ahead", "induction", "echo"), [(1, 0.75, 0.0), (0, 0.0, 0.75), (2, 0.0, 0.0), (-1, 0.0, 0.0)]
)
def test_heads_made_by_hand(occurrence: int, ahead: int, induction: float, echo: float) -> None:
    first = BEGIN + occurrence * SIZE
    mass = mass_on(looking_at(first, END, occurrence * SIZE - ahead, 0.75), earlier(first, END, BEGIN, SIZE))
    assert (mass[0] == induction).all() and (mass[1] == echo).all()


def test_neither_the_token_itself_nor_what_begins_the_prompt_counts() -> None:
    wanted = earlier(BEGIN, END, BEGIN, SIZE)
    assert not wanted[:, :, :BEGIN].any()
    assert not wanted.diagonal(dim1=1, dim2=2, offset=BEGIN).any()
    assert not wanted[:, : SIZE - 1].any()  # the first occurrence has none before it
    assert wanted[1].sum(1).tolist() == [repeat for repeat in range(REPEATS) for _ in range(SIZE)]
