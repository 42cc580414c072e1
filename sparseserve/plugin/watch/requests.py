"""What the requests of this worker asked for, and what the guard made of them.

vLLM's attention metadata knows rows, not requests: which request a row belongs to is the model runner's to tell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from sparseserve.errors import ConfigError
from sparseserve.plugin.watch.metrics import IGNORED_OPTIONS
from sparseserve.policies import Policy
from sparseserve.request_options import RequestOptions, read_options
from sparseserve.types import POLICY_BUDGET
from sparseserve.vllm_version import row_names

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

logger = init_logger(f"vllm.{__name__}")
ASKED = "request"
REMEMBERED = 1024  # ended requests whose outcome may still be asked for


@dataclass(slots=True)
class ServedRequest:
    """A request on this worker; its state lives as long as the request, also while it is preempted."""

    dense: bool  # attends to everything, as asked or by the guard
    budget_tokens: int | None  # None: the policy's
    reason: str = ""  # why it is dense: ASKED, or what the guard says
    recall: float | None = None  # least of the latest sample
    low: dict[int, int] = field(default_factory=dict)  # successive samples under the floor, by group of layers
    under_floor: bool = False
    widened: int = 0  # times

    @classmethod
    def of(cls, options: RequestOptions) -> ServedRequest:
        """A request that starts."""
        return cls(options.dense, options.budget_tokens, ASKED if options.dense else "")

    @property
    def plain(self) -> bool:
        """Whether it is the policy's as it stands."""
        return not self.dense and self.budget_tokens is None


@dataclass(frozen=True, slots=True)
class RowOptions:
    """What sets the rows of a batch apart, where any is not the policy's as it stands."""

    requests: Sequence[ServedRequest | None]  # of R rows; None for rows of padding
    dense: Tensor  # [R] bool
    row_budget: Tensor  # [R] int32 tokens, or POLICY_BUDGET
    dense_up_to: Tensor  # [R] int32 tokens

    def asked(self, chosen: Tensor) -> int:
        """How many of the dense rows `chosen` [R] bool asked to be."""
        rows = zip(self.requests, chosen.tolist(), strict=True)
        return sum(one and request is not None and request.reason == ASKED for request, one in rows)


class ServedRequests:
    """The requests of one worker by vLLM's id."""

    def __init__(self, policy: Policy, runner: RunnerV1 | RunnerV2) -> None:
        self.policy = policy
        self._runner = runner
        self._running: dict[str, ServedRequest] = {}
        self._ended: OrderedDict[str, ServedRequest] = OrderedDict()

    def update(self, scheduled: SchedulerOutput) -> None:
        """Take note of requests that end and begin; one that was preempted goes on with the state that it had."""
        for name in scheduled.finished_req_ids:
            if (ended := self._running.pop(name, None)) is not None:
                self._ended[name] = ended
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        for new in scheduled.scheduled_new_reqs:
            if new.req_id not in self._running:
                params = new.sampling_params
                self._running[new.req_id] = ServedRequest.of(self._options(params and params.extra_args or {}))

    def _options(self, xargs: Mapping[str, object]) -> RequestOptions:
        try:
            return read_options(xargs, self.policy)
        except ConfigError as error:  # the API server refuses them; this one came another way
            logger.warning("sparseserve: a request's options are ignored: %s", error)
            IGNORED_OPTIONS.labels(self.policy.name).inc()
            return RequestOptions()

    def rows(self, common: CommonAttentionMetadata) -> list[ServedRequest | None]:
        """The requests of a batch's rows, in their order; None for padding and for rows that nobody asked for."""
        names = row_names(self._runner, common)
        found = [self._running.get(name) for name in names[: common.num_reqs]]
        return found + [None] * (common.num_reqs - len(found))

    def outcome(self, part: str) -> dict[str, object] | None:
        """What became of the requests whose id has `part` between dashes, several prompts of one call together."""
        names = [name for name in (*self._running, *self._ended) if part in name and f"-{part}-" in f"-{name}-"]
        found = [self._running.get(name) or self._ended.pop(name) for name in names]
        if not found:
            return None
        recalls = [request.recall for request in found if request.recall is not None]
        return {
            "policy": self.policy.name,
            "dense": any(request.dense for request in found),
            "budget_tokens": max(request.budget_tokens or POLICY_BUDGET for request in found),
            "recall": min(recalls, default=None),
            "widened": sum(request.widened for request in found),
            "reason": next((request.reason for request in found if request.reason), ""),
        }


def apart(requests: Sequence[ServedRequest | None], policy: Policy) -> RowOptions | None:
    """The rows as tensors; None where all are the policy's as it stands."""
    if all(request is None or request.plain for request in requests):
        return None
    dense = torch.tensor([request is not None and request.dense for request in requests])
    budgets = [None if request is None else request.budget_tokens for request in requests]
    up_to = [policy.row_dense_up_to(budget) for budget in budgets]
    own = [POLICY_BUDGET if budget is None else budget for budget in budgets]
    return RowOptions(requests, dense, *(torch.tensor(numbers, dtype=torch.int32) for numbers in (own, up_to)))
