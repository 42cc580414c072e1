"""What selections keep, against the policy's own choice and against every combination of layers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention
from sparseserve.calibration.tidal.selection import Curves, Watch, best_layers, choose
from sparseserve.reference import select_units
from sparseserve.types import Selection, Wanted


def test_tokens_are_those_that_the_policy_chooses() -> None:
    mass = torch.rand(3, 100)
    selection = Selection.empty(1, 3, 9, unit_tokens=1)
    full = torch.full((3,), 10, dtype=torch.int32)
    select_units(mass[None], torch.tensor([100]), Wanted(selection, full * 0, full // 10, full))
    own = [
        sorted([*units[:count].tolist(), 99])
        for units, count in zip(selection.units[0], selection.count[0], strict=True)
    ]
    assert choose(mass, 10).sort().values.tolist() == own


def layers_of(*logits: list[list[float]]) -> list[Attention]:
    """Attention of one decode step in which query heads have these logits [Hq, T]; two heads share a KV head."""
    keys = torch.eye(len(logits[0][0]))[None]
    return [Attention(i, torch.tensor(rows)[:, None], keys, keys, 1.0) for i, rows in enumerate(logits)]


def test_kept_mass_of_the_papers_example() -> None:
    """4 tokens, budget 2 with the last: layer 0 chooses token 0, layer 1 token 1; the needle is token 1."""
    first, second = [[5.0, 1, 4, 0]] * 2, [[0.0, 9, 0, 8]] * 2
    watch = Watch(3, selection_heads=1, budget=2, value=range(1, 2))
    for attention in layers_of(first, second, second):
        watch(attention)
    weights = torch.tensor(second[0]).softmax(0)
    assert watch.kept[0, 2] == pytest.approx(float(weights[0] + weights[3]))
    assert watch.kept[1, 2] == watch.kept[2, 2] == pytest.approx(float(weights[1] + weights[3]))
    assert watch.needle[0, 2] == 0 and watch.needle[1, 2] == watch.on_needle[2] == pytest.approx(2 * float(weights[1]))


def random_curves(layers: int) -> Curves:
    generator = torch.Generator().manual_seed(layers)
    on_needle = torch.rand(layers, generator=generator).double()
    text, needle = torch.rand(2, layers, layers, generator=generator).double().triu()
    return Curves(text, needle * on_needle, on_needle)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("select_layer", [0, 2])
def test_best_layers_are_the_best_of_all(select_layer: int, count: int) -> None:
    curves = random_curves(8)
    every = combinations(range(select_layer + 1, 8), count)
    best = max(every, key=lambda layers: sum(curves.kept(select_layer, layers)))
    assert best_layers(curves, select_layer, count) == best
    assert all(0 <= share <= 1 for share in curves.kept(select_layer, best))


def test_a_faint_needle_counts_as_much_as_all_text() -> None:
    """Layer 4 alone looks at the needle, with 1 % of a head; layer 3 has it, layer 1 serves text a bit better."""

    def only(entries: dict[tuple[int, int], float]) -> Tensor:
        table = torch.zeros(5, 5, dtype=torch.float64)
        for place, value in entries.items():
            table[place] = value
        return table

    text = only({(c, layer): 0.90 + 0.02 * (c == 1) for layer in range(5) for c in range(layer)})
    curves = Curves(text, only({(3, 4): 0.01}), torch.tensor([0, 0, 0, 0, 0.01], dtype=torch.float64))
    assert best_layers(curves, 0, 1) == (3,)
