"""95 % confidence intervals of a mean score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(scores: Sequence[float], exact: bool, seed: int) -> tuple[float, float]:
    """Wilson's where scores are 0 or 1, the percentile bootstrap's (seeded) where they are shares.

    One share says nothing about the others: 0 to 1.
    """
    if exact:
        found = stats.binomtest(sum(score == 1 for score in scores), len(scores))
        low, high = found.proportion_ci(CONFIDENCE, method="wilson")
    elif len(scores) < 2:
        low, high = 0, 1
    else:
        bootstrap = stats.bootstrap(
            (scores,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed)
        )
        low, high = bootstrap.confidence_interval
    return float(low), float(high)
