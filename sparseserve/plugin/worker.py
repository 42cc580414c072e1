"""What the API server may ask of a worker (`--worker-extension-cls`)."""

from __future__ import annotations

from sparseserve.plugin.stats import Snapshot, snapshot


class StatsExtension:
    """Adds `sparseserve_stats` to the methods that `collective_rpc` reaches."""

    def sparseserve_stats(self) -> Snapshot:
        """The worker's metrics."""
        return snapshot()
