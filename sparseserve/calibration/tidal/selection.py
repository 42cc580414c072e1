"""How much attention earlier layers' selections keep (TidalDecode, arXiv 2410.05076), and where to select again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention


def choose(mass: Tensor, budget: int) -> Tensor:
    """Positions [Hs, k] int64 that tidal chooses by mass [Hs, T]: the best, and always the last."""
    ranked = mass.clone()
    ranked[:, -1] = torch.inf
    return ranked.topk(min(budget, mass.shape[1])).indices


class Watch:
    """A hook that lets every layer choose tokens, and sums over rows what later layers keep with each choice.

    It looks at dense attention: what a layer would see after sparse ones is taken to be the same.
    """

    def __init__(
        self, layers: int, selection_heads: int, budget: int, rows: Sequence[int] = (), value: range = range(0)
    ) -> None:
        self._heads, self._budget, self._rows, self._value = selection_heads, budget, rows, value
        self._chosen: dict[tuple[int, int], Tensor] = {}  # (layer, row) -> [Hs, k]
        self.kept = torch.zeros(layers, layers, dtype=torch.float64)  # [choosing, keeping], mean over query heads
        self.needle = torch.zeros(layers, layers, dtype=torch.float64)  # the same, on the needle; sum over query heads
        self.on_needle = torch.zeros(layers, dtype=torch.float64)  # kept or not
        self.rows = 0  # that were summed

    def __call__(self, attention: Attention) -> None:
        """Look at the rows, or at the one of a decode step."""
        rows = self._rows or (attention.start,)
        if attention.layer == 0:
            self._chosen.clear()
            self.rows += len(rows)
        for row in rows:
            weights = attention.weights(row, row + 1)[:, 0]
            self._look(attention.layer, row, weights.view(self._heads, -1, row + 1).sum(1), len(weights))

    def _look(self, layer: int, row: int, mass: Tensor, query_heads: int) -> None:
        self._chosen[layer, row] = choose(mass, self._budget)
        self.on_needle[layer] += float(mass[:, self._value.start : self._value.stop].sum())
        for chooser in range(layer + 1):
            places = self._chosen[chooser, row]
            held = mass.gather(1, places)
            self.kept[chooser, layer] += float(held.sum()) / query_heads
            inside = (places >= self._value.start) & (places < self._value.stop)
            self.needle[chooser, layer] += float(held[inside].sum())


@dataclass(frozen=True, slots=True)
class Curves:
    """What layer l keeps with the tokens that layer c <= l chose, as [c, l]."""

    text: Tensor  # [L, L] fp64: attention mass of text rows, mean over rows and query heads
    needle: Tensor  # [L, L] fp64: mass on the needle in rows of answers, mean over rows, sum over query heads
    on_needle: Tensor  # [L] fp64: that mass with every token kept
    right: int = 1  # needles answered right, which alone count
    asked: int = 1

    def shares(self, select_layer: int) -> Tensor:
        """What an entry is of all that the layers behind `select_layer` have, [2, L, L]: text, needle.

        On the diagonal is what a layer has that attends to everything, as selection layers do. To text all layers count
        alike; to the needle by what they look at it: heads that do are few, and a mean over all would not miss them.
        """
        text, needle = self.text.clone().fill_diagonal_(1), self.needle.clone()
        needle.diagonal().copy_(self.on_needle)
        return torch.stack([text / (len(text) - select_layer - 1), needle / self.on_needle[select_layer + 1 :].sum()])

    def kept(self, select_layer: int, reselect: Sequence[int]) -> tuple[float, float]:
        """The shares of text mass and of needle mass that all layers behind `select_layer` keep."""
        layers = range(select_layer + 1, len(self.text))
        choosers = [max(chooser for chooser in (select_layer, *reselect) if chooser <= layer) for layer in layers]
        text, needle = self.shares(select_layer)[:, choosers, list(layers)].sum(1).tolist()
        return text, needle


def best_layers(curves: Curves, select_layer: int, count: int) -> tuple[int, ...]:
    """The `count` reselection layers of all combinations that keep most, of text and needle together.

    Ties go to the lower layers.
    """
    worth = curves.shares(select_layer).mean(0)

    @cache
    def best(chooser: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The most that the layers behind a chooser can keep with so many more, and these."""
        if not left:
            return float(worth[chooser, chooser + 1 :].sum()), ()
        found: tuple[float, tuple[int, ...]] = (0.0, ())
        for layer in range(chooser + 1, len(worth) - left + 1):
            behind, layers = best(layer, left - 1)
            total = float(worth[chooser, chooser + 1 : layer].sum() + worth[layer, layer]) + behind
            found = max(found, (total, (layer, *layers)), key=lambda pair: pair[0])
        return found

    return best(select_layer, count)[1]
