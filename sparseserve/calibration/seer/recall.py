"""How much of the attention mass the blocks hold that a score chooses.

The mass of a block is the sum of the attention weights of its tokens, mean over the query heads of the group. Scores
choose among the blocks before the row's own: at a density of 1/8 the best n // 8 of n. Recall is the mass that they
hold over the mass that the n // 8 heaviest blocks hold, both summed over all rows and heads before they are divided:
rows that attend elsewhere count little.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS_PER_CHOSEN = 8  # a density of 12.5 %


def best_blocks(scores: Tensor, rows: Tensor, block: int) -> Tensor:
    """Which blocks [L, R, H, N] bool `scores` [L, R, H, N] choose for the queries at positions `rows` [R]."""
    earlier = (rows // block)[:, None, None]  # [R, 1, 1]
    later = torch.arange(scores.shape[-1], device=rows.device) >= earlier
    ranks = scores.masked_fill(later, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < (earlier // BLOCKS_PER_CHOSEN).clamp(min=1)


def held(scores: Tensor, mass: Tensor, rows: Tensor, block: int) -> Tensor:
    """The mass [L, H] that the chosen blocks hold of `mass` [L, R, H, N], summed over the rows."""
    return (mass * best_blocks(scores, rows, block)).sum((1, 3))
