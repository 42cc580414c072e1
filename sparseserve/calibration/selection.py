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

    def __call__(self, attention: Attention) -> None:
        """Look at the rows, or at the one of a decode step."""
        if attention.layer == 0:
            self._chosen.clear()
        for row in self._rows or (attention.start,):
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
    """What layer l keeps with the tokens that layer c <= l chose, 0 to 1."""

    text: Tensor  # [L, L] fp64 [c, l]: attention mass of text rows, mean over rows and query heads
    needle: (
        Tensor  # [L, L] fp64 [c, l]: the mass on the needle in rows of answers, in heads: mean over rows, sum of heads
    )
    on_needle: Tensor  # [L] fp64: that mass with every token kept
    right: int = 1  # needles answered right, which alone count
    asked: int = 1

    def worth(self, select_layer: int) -> Tensor:
        """What each entry adds to the objective [L, L], half of it text and half needle; 1 in all where all is kept.

        All layers behind `select_layer` count alike, as to text by their mass, as to the needle by the mass they put
        there: the heads that look at it are few, and a mean over all heads would not miss them.
        """
        later = len(self.text) - select_layer - 1
        return self.text / later / 2 + self.needle / self.on_needle[select_layer + 1 :].sum() / 2

    def worth_dense(self, select_layer: int) -> Tensor:
        """The same [L] of layers that attend to everything, as selection layers do."""
        later = len(self.text) - select_layer - 1
        return 1 / later / 2 + self.on_needle / self.on_needle[select_layer + 1 :].sum() / 2

    def kept(self, select_layer: int, reselect: Sequence[int]) -> tuple[float, float]:
        """The shares of text mass and of needle mass that all layers behind `select_layer` keep."""
        chooser, text, needle = select_layer, 0.0, 0.0
        for layer in range(select_layer + 1, len(self.text)):
            if layer in reselect:
                chooser, text, needle = layer, text + 1, needle + float(self.on_needle[layer])
            else:
                text += float(self.text[chooser, layer])
                needle += float(self.needle[chooser, layer])
        return text / (len(self.text) - select_layer - 1), needle / float(self.on_needle[select_layer + 1 :].sum())


def best_layers(curves: Curves, select_layer: int, count: int) -> tuple[int, ...]:
    """The `count` reselection layers that keep most, of all combinations; ties go to the lower layers."""
    worth, dense = curves.worth(select_layer), curves.worth_dense(select_layer)

    @cache
    def best(chooser: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The most that the layers behind a chooser can keep with so many more, and these."""
        if not left:
            return float(worth[chooser, chooser + 1 :].sum()), ()
        found: tuple[float, tuple[int, ...]] = (0.0, ())
        for layer in range(chooser + 1, len(worth) - left + 1):
            behind, layers = best(layer, left - 1)
            total = float(worth[chooser, chooser + 1 : layer].sum() + dense[layer]) + behind
            found = max(found, (total, (layer, *layers)), key=lambda pair: pair[0])
        return found

    return best(select_layer, count)[1]
