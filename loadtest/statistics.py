"""From runs to numbers: percentiles, intervals over repeats, and differences beyond the noise of the control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import mean, median
from typing import Literal

import numpy as np
from scipy import stats

from loadtest.bench import BenchResult

PERCENTILES = (50, 95, 99)
LATENCIES = tuple(f"{name}_p{share}" for name in ("ttft", "tpot", "itl") for share in PERCENTILES)  # ms
RATES = ("goodput", "output_throughput", "request_throughput")  # requests, tokens, requests a second
METRICS = LATENCIES + RATES

Outcome = Literal["faster", "slower", "no difference", "not measured"]


def numbers(result: BenchResult) -> dict[str, float]:
    """The metrics of a run; those that nothing in it measured are missing.

    TPOT is vLLM's: (latency - TTFT) / (output tokens - 1), of answers of two tokens or more.
    """
    done = [i for i, length in enumerate(result.output_lens) if length and not result.errors[i]]
    per_token = [
        (result.latencies[i] - result.ttfts[i]) / (result.output_lens[i] - 1) for i in done if result.output_lens[i] > 1
    ]
    seconds = {
        "ttft": [result.ttfts[i] for i in done],
        "tpot": per_token,
        "itl": [gap for i in done for gap in result.itls[i]],
    }
    found = {
        f"{name}_p{share}": 1000 * float(np.percentile(values, share))
        for name, values in seconds.items()
        if values
        for share in PERCENTILES
    }
    rates = (result.request_goodput, result.output_throughput, result.request_throughput)
    return found | {name: rate for name, rate in zip(RATES, rates, strict=True) if rate is not None}


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of a metric over repeats, with Student's 95 % interval, which takes them as independent."""

    value: float
    low: float
    high: float
    runs: list[float]


def estimate(runs: Sequence[float]) -> Estimate:
    """Of two runs or more."""
    middle, error = mean(runs), float(stats.sem(runs))
    reach = float(stats.t.ppf(0.975, len(runs) - 1)) * error
    return Estimate(middle, middle - reach, middle + reach, list(runs))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers, 0 to 1, with its 95 % interval where one is known."""

    value: float
    interval: tuple[float, float] | None


def accuracy(right: int, sent: int) -> Accuracy:
    """With Wilson's interval."""
    found = stats.binomtest(right, sent).proportion_ci(method="wilson")
    return Accuracy(right / sent, (float(found.low), float(found.high)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A metric of a policy against the control's at the same load."""

    metric: str
    load: str
    ratio: float | None  # of the medians over repeats
    band: float | None  # >= 1: a ratio within [1 / band, band] is what the control shows against itself
    outcome: Outcome


def band(control: Sequence[float], again: Sequence[float]) -> float | None:
    """The largest ratio between a run of the control and a run of the control again, >= 1; None where one is 0."""
    if not control or not again or min(*control, *again) <= 0:
        return None
    return exp(max(abs(log(one / other)) for one in control for other in again))


def compare(
    metric: str, load: str, policy: Sequence[float], control: Sequence[float], again: Sequence[float]
) -> Comparison:
    """Faster or slower only outside of what the control shows against itself."""
    noise = band(control, again)
    if noise is None or not policy or (metric in LATENCIES and median(policy) <= 0):
        return Comparison(metric, load, None, noise, "not measured")
    ratio = median(policy) / median([*control, *again])
    better = 1 / ratio if metric in LATENCIES else ratio  # a rate of 0 is the slowest
    outcome: Outcome = "faster" if better > noise else "slower" if better < 1 / noise else "no difference"
    return Comparison(metric, load, ratio, noise, outcome)


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One word over several loads: faster or slower where some say so and none says the contrary."""
    outcomes = {one.outcome for one in comparisons}
    if {"faster", "slower"} <= outcomes:
        return "faster at some loads, slower at others"
    return next((word for word in ("faster", "slower", "no difference") if word in outcomes), "not measured")
