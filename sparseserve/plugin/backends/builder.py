"""What the metadata builders of both backends have in common: the requests behind a batch's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from sparseserve.plugin.backends.rows import RowSplit, split_rows
from sparseserve.plugin.watch.meter import Meter
from sparseserve.plugin.watch.requests import RowOptions, ServedRequest, ServedRequests, apart
from sparseserve.policies import Policy


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's rows, without padding."""

    requests: Sequence[ServedRequest | None]  # of R rows
    rows: RowOptions | None  # None where all are the policy's as it stands
    split: RowSplit

    @property
    def row_budget(self) -> Tensor | None:
        """[R] int32 tokens, where some row has a budget of its own."""
        return None if self.rows is None or not self.rows.row_budget.any() else self.rows.row_budget

    def count(self, meter: Meter) -> None:
        """Count the rows by the path they take."""
        meter.count_rows(self.split, 0 if self.rows is None else self.rows.asked(self.split.asked))


class SparseBuilder:
    """Comes before vLLM's own class among the bases."""

    _policy: Policy | None = None
    _requests: ServedRequests | None = None

    def serve(self, requests: ServedRequests) -> None:
        """Take the table that tells which request a row belongs to."""
        self._requests = requests

    def follow(self, policy: Policy) -> None:
        """Take the policy that rows are under, and requests are read by."""
        self._policy = policy
        if self._requests is not None:
            self._requests.policy = policy

    def _count(self, batch: Batch, meter: Meter) -> None:
        """Count a batch, unless nobody asked for it: vLLM warms up with such."""
        if self._requests is None or any(request is not None for request in batch.requests):
            batch.count(meter)

    def _batch(self, common: CommonAttentionMetadata) -> Batch:
        policy = self._policy
        assert policy is not None
        requests = [None] * common.num_reqs if self._requests is None else self._requests.rows(common)
        rows = apart(requests, policy)
        if rows is None:
            return Batch(requests, None, split_rows(common, policy.dense_up_to))
        return Batch(requests, rows, split_rows(common, rows.dense_up_to, rows.dense))
