"""What the metadata builders of both backends have in common: the requests behind a batch's rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

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


Metadata = Any  # what layers take of a builder: each backend has a class of its own, and a GroupedStep beside it


class SparseBuilder(AttentionMetadataBuilder[Metadata]):
    """Comes before vLLM's own class among the bases."""

    kv_cache_spec: AttentionSpec

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

    @property
    def policy(self) -> Policy:
        """The policy that rows are under."""
        assert self._policy is not None
        return self._policy

    @abstractmethod
    def metadata(self, common: CommonAttentionMetadata, batch: Batch) -> Metadata:
        """What the layers get of a batch; nothing is counted."""

    def _count(self, batch: Batch, meter: Meter) -> None:
        """Count a batch, unless nobody asked for it: vLLM warms up with such."""
        if self._requests is None or any(request is not None for request in batch.requests):
            batch.count(meter)

    def batch(self, common: CommonAttentionMetadata) -> Batch:
        """The rows of vLLM's metadata, and the way each takes."""
        policy = self.policy
        requests = [None] * common.num_reqs if self._requests is None else self._requests.rows(common)
        rows = apart(requests, policy)
        if rows is None:
            return Batch(requests, None, split_rows(common, policy.dense_up_to))
        return Batch(requests, rows, split_rows(common, rows.dense_up_to, rows.dense))
