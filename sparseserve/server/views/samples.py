"""The project's metrics in a registry, to be read by name."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

OURS = "sparseserve_"


class Samples:
    """One look at a registry; what it does not hold is None, not 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._samples = [
            sample for metric in registry.collect() if metric.name.startswith(OURS) for sample in metric.samples
        ]

    def named(self, name: str) -> Iterator[Sample]:
        """The samples of `sparseserve_{name}`."""
        return (sample for sample in self._samples if sample.name == OURS + name)

    def labels(self, name: str) -> dict[str, str]:
        """The labels of the sample that is 1, as info metrics have it."""
        return next((sample.labels for sample in self.named(name) if sample.value), {})

    def total(self, name: str) -> float | None:
        """The sum over all labels."""
        values = [sample.value for sample in self.named(name)]
        return sum(values) if values else None

    def by(self, name: str, label: str) -> dict[str, float] | None:
        """The sums by the values of a label."""
        sums: dict[str, float] = {}
        for sample in self.named(name):
            sums[sample.labels[label]] = sums.get(sample.labels[label], 0.0) + sample.value
        return sums or None
