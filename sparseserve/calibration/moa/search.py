"""The windows of all KV heads that lose the least within a density: MoA's integer program, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, kron
from torch import Tensor

from sparseserve.errors import CalibrationError, Problem

CONFIGURATIONS = 2  # different windows in a layer, at most
POINTS = 5  # of the sweep between the plans that are best at one length
SECONDS = 60.0  # for one program
GAP = 1e-3  # of a solution's loss to the proven bound, relative

Array = NDArray[np.float64]


def check_density(densities: Tensor, bounds: Mapping[int, float]) -> None:
    """CalibrationError if even the smallest windows read more than allowed; arguments as in Search."""
    for least, (length, bound) in zip(densities.amin(-1).tolist(), bounds.items(), strict=True):
        if least > bound:
            allowed = f"at least {least:.3f} at {length} tokens, the smallest window of every head"
            raise CalibrationError(Problem("--density", bound, allowed, remedy="raise it or take longer lengths"))


@dataclass(frozen=True, slots=True)
class Search:
    """One window for every KV head: of C candidates, at most two different ones in a layer."""

    losses: Tensor  # [K, L, H, C] fp64, of a head's candidate at each of K lengths
    beyond: Tensor  # [L, H, C] fp64, a guess at the loss at a length that was not measured
    densities: Tensor  # [M, C] fp64, share of tokens read at each of M lengths; one candidate is the least at all
    bounds: Mapping[int, float]  # on the mean density over all heads, at each of the M lengths

    def loss(self, choice: Tensor) -> Tensor:
        """The loss [K] fp64 at each length of a candidate for every head [L, H]."""
        return self.losses.gather(-1, choice.expand(len(self.losses), -1, -1)[..., None]).sum((1, 2, 3))

    def pareto(self) -> tuple[list[Tensor], float]:
        """The candidate of every head [L, H] int64, of plans none of which loses more everywhere than another; the gap.

        The best plan of each length, and epsilon constraints between: the least loss at the last length while those at
        the others stay below levels from their best to their worst. Of plans that lose the same, the one that loses the
        least beyond: of a window of 1024 tokens and one of everything, rows of 1024 cannot tell.
        """
        check_density(self.densities, self.bounds)
        scale = self.losses.amax(-1).sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
        program = _Program(self.losses / scale[:, None, None, None], self.densities, list(self.bounds.values()))
        best = [program.solve(losses) for losses in program.losses]
        if any(plan is None for plan in best):
            remedy = "take fewer lengths or another density"
            raise CalibrationError(Problem("search", "no plan", f"one in {SECONDS:g} seconds", remedy=remedy))
        losses = np.array(best) @ program.losses.T  # [K, K]
        levels: Array = np.linspace(losses.min(0), losses.max(0), POINTS)[: -1 if len(best) > 1 else 0, :-1]
        between = [program.solve(program.losses[-1], level) for level in levels]
        plans = np.unique([plan for plan in (*best, *between) if plan is not None], axis=0)
        kept = np.unique(
            [program.settle(plan, self.beyond) for plan in _undominated(plans, plans @ program.losses.T)], axis=0
        )
        return [torch.from_numpy(plan.reshape(program.shape).argmax(-1)) for plan in kept], program.gap


class _Program:
    """Binary x [L, H, C], the choice, and y [L, C], what a layer may choose; all constraints as sparse matrices."""

    def __init__(self, losses: Tensor, densities: Tensor, bounds: Sequence[float]) -> None:
        self.gap = 0.0  # the largest of all solutions so far, relative
        self.shape = layers, heads, choices = losses.shape[1:]
        self.losses: Array = losses.flatten(1).numpy()  # [K, L * H * C]
        self.x, self.y = layers * heads * choices, layers * choices  # variables
        one_of_a_head = kron(eye_array(layers * heads), np.ones((1, choices)))
        offers_of_a_layer = kron(eye_array(layers), np.ones((1, choices)))
        offer = kron(eye_array(layers), kron(np.ones((heads, 1)), eye_array(choices)))
        read = np.tile(densities.numpy() / (layers * heads), (1, layers * heads))
        self.constraints = [
            LinearConstraint(self._matrix(one_of_a_head), 1, 1),
            LinearConstraint(self._matrix(eye_array(self.x), -offer), -np.inf, 0),
            LinearConstraint(self._matrix(None, offers_of_a_layer), -np.inf, CONFIGURATIONS),
            LinearConstraint(self._matrix(read), -np.inf, np.array(bounds)),
        ]

    def solve(self, cost: Array, levels: Array | None = None) -> Array | None:
        """The x of least cost, its losses at the first lengths at most `levels`; None where none is found."""
        constraints = list(self.constraints)
        if levels is not None:
            constraints.append(LinearConstraint(self._matrix(self.losses[: len(levels)]), -np.inf, levels))
        costs = np.concatenate([cost, np.zeros(self.y)])
        options = {"time_limit": SECONDS, "mip_rel_gap": GAP}
        binary = {"integrality": np.ones_like(costs), "bounds": Bounds(0, 1)}
        found = milp(costs, constraints=constraints, options=options, **binary)
        if found.x is None:
            return None
        self.gap = max(self.gap, float(found.mip_gap))
        plan: Array = np.round(found.x[: self.x])
        return plan

    def settle(self, plan: Array, beyond: Tensor) -> Array:
        """The x that loses the least beyond, and as little as this one at the measured lengths."""
        worst = max(float(beyond.amax(-1).sum()), torch.finfo(torch.float64).tiny)
        settled = self.solve(beyond.flatten().numpy() / worst, (self.losses @ plan) * (1 + GAP))
        return plan if settled is None else settled

    def _matrix(self, x: Any = None, y: Any = None) -> Any:
        rows = (y if x is None else x).shape[0]
        parts = (csr_array((rows, width)) if part is None else part for part, width in ((x, self.x), (y, self.y)))
        return hstack(list(parts), format="csr")


def _undominated(plans: Array, losses: Array) -> list[Array]:
    """The plans [n] none of which loses [n, K] less than another at one length and no more at all."""
    better = (losses[:, None] <= losses).all(-1) & (losses[:, None] < losses).any(-1)  # [n, n], the first is
    return list(plans[~better.any(0)])
