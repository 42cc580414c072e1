"""The copy score: what counts as a token copied, and the heads that it finds."""

from __future__ import annotations

import pytest
import torch

from sparseserve.calibration.retrieval.copying import MAJORITY, Trace, copied
from sparseserve.calibration.samples import Needle

NEEDLE = Needle([*range(10, 20), 13], range(3, 6), "value")  # the value's tokens are 13, 14, 15
ANSWER = [13, 14, 15, 99]


def traced(positions: list[int], mass: float) -> Trace:
    """One head of one layer that looks at these positions in the steps of the answer."""
    position = torch.tensor(positions).view(-1, 1, 1)
    return Trace(position, torch.full(position.shape, mass), torch.tensor(ANSWER), right=True)


@pytest.mark.parametrize(
    ("positions", "score"),
    [
        ([3, 4, 5, 0], 1),  # copies all
        ([3, 4, 4, 5], 2 / 3),  # looks at the wrong token of the value twice
        ([10, 6, 7, 8], 0),  # looks at the same token elsewhere, and past the value
        ([0, 0, 5, 12], 1 / 3),  # the last position is one of the answer
    ],
)
@pytest.mark.parametrize(("mass", "least_mass", "counts"), [(0.2, 0.0, 1), (0.2, MAJORITY, 0), (0.6, MAJORITY, 1)])
def test_copy_score(positions: list[int], score: float, mass: float, least_mass: float, counts: int) -> None:
    assert float(copied(traced(positions, mass), NEEDLE, least_mass)) == pytest.approx(score * counts)


def test_no_token_counts_twice() -> None:
    twice = Trace(torch.full((2, 1, 1), 3), torch.ones(2, 1, 1), torch.tensor([13, 13]), right=False)
    assert float(copied(twice, NEEDLE)) == pytest.approx(1 / 3)


def test_an_empty_answer_copies_nothing() -> None:
    nothing = torch.empty(0, 2, 3)
    assert not copied(Trace(nothing.long(), nothing, torch.tensor([]).long(), right=False), NEEDLE).any()
