"""95 % confidence intervals of a mean score."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(scores: Sequence[float], exact: bool, seed: int) -> tuple[float, float]:
    """Wilson's where scores are 0 or 1, the percentile bootstrap's (seeded) where they are shares.

    Of equal shares the bootstrap would make a certainty; they get Wilson's, for no share varies more than 0 and 1 do.
    """
    if exact or len(set(scores)) == 1:
        low, _ = _wilson(floor(sum(scores)), len(scores))
        _, high = _wilson(ceil(sum(scores)), len(scores))
    else:
        bootstrap = stats.bootstrap(
            (scores,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed)
        )
        low, high = bootstrap.confidence_interval
    return float(low), float(high)


def _wilson(right: int, asked: int) -> tuple[float, float]:
    low, high = stats.binomtest(right, asked).proportion_ci(CONFIDENCE, method="wilson")
    return low, high
