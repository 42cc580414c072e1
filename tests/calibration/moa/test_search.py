"""The integer program finds what trying every plan finds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseserve.calibration.moa import search as moa_search
from sparseserve.calibration.moa.search import CONFIGURATIONS, GAP, Search
from sparseserve.errors import CalibrationError


def instance(seed: int, layers: int, heads: int, choices: int, lengths: int) -> Search:
    draw = torch.Generator().manual_seed(seed)
    losses = torch.rand(lengths, layers, heads, choices, generator=draw).double() ** 3
    densities = torch.rand(lengths, choices, generator=draw).double()
    densities[:, 0] = 0.1  # the smallest window
    beyond = torch.rand(layers, heads, choices, generator=draw).double()
    return Search(losses, beyond, densities, {1024: 0.5, 2048: 0.4} if lengths == 2 else {2048: 0.4})


def everything(search: Search) -> tuple[list[Tensor], Tensor]:
    """All plans within the density and the configurations of a layer, and their losses [n, K]."""
    _, layers, heads, choices = search.losses.shape
    plans = []
    for choice in product(range(choices), repeat=layers * heads):
        plan = torch.tensor(choice).view(layers, heads)
        few = all(len(set(layer.tolist())) <= CONFIGURATIONS for layer in plan)
        if few and (density(search, plan) <= torch.tensor(list(search.bounds.values())) + 1e-9).all():
            plans.append(plan)
    return plans, torch.stack([search.loss(plan) for plan in plans])


def guess(search: Search, plan: Tensor) -> float:
    return float(search.beyond.gather(-1, plan[..., None]).sum())


def density(search: Search, plan: Tensor) -> Tensor:
    return search.densities[:, plan.flatten()].mean(-1)


@pytest.mark.parametrize(
    ("layers", "heads", "choices", "lengths"), [(1, 3, 4, 2), (2, 3, 3, 2), (1, 5, 4, 1), (2, 2, 4, 2), (3, 1, 6, 1)]
)
@pytest.mark.parametrize("seed", range(4))
def test_plans_are_those_of_brute_force(layers: int, heads: int, choices: int, lengths: int, seed: int) -> None:
    search = instance(seed, layers, heads, choices, lengths)
    plans, losses = everything(search)
    assert any(density(search, plan).max() > 0.3 for plan in plans)
    found, gap = search.pareto()
    assert gap <= GAP
    for plan in found:
        assert any(torch.equal(plan, one) for one in plans)
        assert not (losses < search.loss(plan) * (1 - 3 * GAP)).all(-1).any()  # none is better at every length
        as_good = [one for one in plans if (search.loss(one) <= search.loss(plan)).all()]
        assert guess(search, plan) <= min(guess(search, one) for one in as_good) * (1 + 2 * GAP)
    best = torch.stack([search.loss(plan) for plan in found]).amin(0)
    np.testing.assert_allclose(best, losses.amin(0), rtol=3 * GAP)


def test_the_pareto_set_is_several_plans_none_better_than_another() -> None:
    search = instance(1, layers=2, heads=3, choices=3, lengths=2)
    losses = torch.stack([search.loss(plan) for plan in search.pareto()[0]])
    assert len(losses) > 1
    first, second = losses[losses[:, 0].argsort()].T
    assert (first.diff() > 0).all() and (second.diff() < 0).all()


def test_a_layer_has_two_windows_at_most() -> None:
    """Of five heads each wants another of five windows, which all read the same."""
    losses = 1 - torch.eye(5).double()[None, None]
    search = Search(losses, losses[0], torch.full((1, 5), 0.5).double(), {2048: 0.5})
    plans, _ = search.pareto()
    assert float(search.loss(plans[0])) == 3
    assert len(set(plans[0].flatten().tolist())) == 2


def test_an_impossible_density_says_the_least_possible() -> None:
    search = instance(0, layers=1, heads=2, choices=3, lengths=2)
    with pytest.raises(CalibrationError, match=r"--density = 0.05 .* at least 0.100 at 2048 tokens"):
        Search(search.losses, search.beyond, search.densities, {1024: 0.5, 2048: 0.05}).pareto()


def test_no_plan_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moa_search, "SECONDS", 0.0)
    with pytest.raises(CalibrationError, match="one in 0 seconds"):
        instance(0, layers=2, heads=3, choices=3, lengths=2).pareto()
