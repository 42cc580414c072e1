"""Which requests the rows of a batch belong to, what they asked for, and how long that is remembered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sparseserve.plugin.backends.rows import split_rows
from sparseserve.plugin.watch import metrics
from sparseserve.plugin.watch.requests import REMEMBERED, ServedRequests, apart
from sparseserve.policies import Policy, Quest, Streaming
from tests.helpers.plugin.worker_metrics import value

pytestmark = pytest.mark.vllm
POLICY = Quest(budget_tokens=512, min_tokens=256)
DENSE, SMALL = {"sparse_policy": "dense"}, {"sparse_budget_tokens": 128}


class Runner:
    """As much of vLLM's model runners as tells which request a row belongs to."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=[])
        self.req_states = SimpleNamespace(index_to_req_id={})


def scheduled(new: dict[str, Any] | None = None, ended: set[str] | None = None) -> Any:
    """vLLM's SchedulerOutput, as far as it is read."""
    arrivals = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=xargs))
        for name, xargs in (new or {}).items()
    ]
    return SimpleNamespace(finished_req_ids=ended or set(), scheduled_new_reqs=arrivals)


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def requests(runner: Runner) -> ServedRequests:
    table = ServedRequests(POLICY, cast(Any, runner))  # has what is read of one
    table.update(scheduled({"a": None, "b": DENSE, "c": SMALL, "d": {"other": 1}}))
    return table


def batch(names: int, req_idx: Any = None, lengths: list[int] | None = None) -> Any:
    lengths = lengths or [4000] * names
    return SimpleNamespace(
        num_reqs=names,
        req_idx=req_idx,
        query_start_loc_cpu=torch.arange(names + 1),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        is_prefilling=torch.zeros(names, dtype=torch.bool),
    )


def test_rows_follow_the_runner_whatever_their_order(requests: ServedRequests, runner: Runner) -> None:
    for order in ("abcd", "dcba", "cadb"):
        runner.input_batch.req_ids = list(order)
        rows = requests.rows(batch(5))  # a row of padding at the end
        assert [row and (row.dense, row.budget_tokens) for row in rows[:4]] == [
            {"a": (False, None), "b": (True, None), "c": (False, 128), "d": (False, None)}[name] for name in order
        ]
        assert rows[4] is None
    runner.req_states.index_to_req_id = {7: "b", 3: "c"}  # runner V2 gives places in its table
    del runner.input_batch  # which V2 lacks
    rows = requests.rows(batch(3, req_idx=torch.tensor([3, 7, 9]).numpy()))
    assert [row and (row.dense, row.budget_tokens) for row in rows] == [(False, 128), (True, None), None]
    assert requests.rows(batch(2)) == [None, None]  # of the check at start


def test_a_batch_of_plain_rows_costs_nothing(requests: ServedRequests, runner: Runner) -> None:
    runner.input_batch.req_ids = ["a", "d"]
    assert apart(requests.rows(batch(2)), POLICY) is None


def test_rows_split_by_what_they_asked_for(requests: ServedRequests, runner: Runner) -> None:
    runner.input_batch.req_ids = list("abcd")
    rows = apart(requests.rows(batch(4)), POLICY)
    assert rows is not None
    split = split_rows(batch(4, lengths=[4000, 4000, 400, 400]), rows.dense_up_to, rows.dense)
    assert split.sparse.tolist() == [0, 2]  # c has a budget of 128 tokens, and is longer than min_tokens
    assert (split.dense.tolist(), split.short, rows.asked(split.asked)) == ([1, 3], 1, 1)
    short = split_rows(batch(4, lengths=[10, 10, 10, 10]), rows.dense_up_to, rows.dense)
    assert (short.short, rows.asked(short.asked)) == (4, 0)  # a short row is dense for its length


def test_state_outlives_preemption_and_ends_with_the_request(requests: ServedRequests, runner: Runner) -> None:
    runner.input_batch.req_ids = ["a"]
    (row,) = requests.rows(batch(1))
    assert row is not None
    row.dense, row.reason = True, "recall"
    requests.update(scheduled({"a": None}))  # runner V2 sees a request that resumes as a new one
    assert requests.rows(batch(1)) == [row]
    requests.update(scheduled({"a": None}, ended={"a"}))  # aborted, and sent again under the same id
    (again,) = requests.rows(batch(1))
    assert again is not None and not again.dense


def test_outcomes_are_told_once_by_the_id_of_the_call(requests: ServedRequests) -> None:
    requests.update(scheduled({"cmpl-q1-0-aa": SMALL, "cmpl-q1-1-bb": DENSE, "cmpl-q10-0-cc": None}))
    assert requests.outcome("q1") == {
        "policy": "quest", "dense": True, "budget_tokens": 128, "recall": None, "widened": 0, "reason": "request",
    }  # fmt: skip
    requests.update(scheduled(ended={"cmpl-q1-0-aa", "cmpl-q1-1-bb", "cmpl-q10-0-cc"}))
    assert requests.outcome("q1") is not None
    assert requests.outcome("q1") is None
    assert requests.outcome("q10") is not None
    assert requests.outcome("q") is None


def test_ended_requests_do_not_pile_up(requests: ServedRequests) -> None:
    for number in range(2 * REMEMBERED):
        requests.update(scheduled({f"cmpl-q{number}-0": None}, ended={f"cmpl-q{number - 1}-0"}))
    assert all(requests.outcome(name) for name in "abcd")
    told = [number for number in range(2 * REMEMBERED) if requests.outcome(f"q{number}")]
    assert told == [*range(REMEMBERED - 1, 2 * REMEMBERED)]  # those that ended, and the one that runs


@pytest.mark.parametrize(
    ("policy", "xargs"),
    [(POLICY, {"sparse_budget_tokens": 1}), (POLICY, {"sparse_policy": "moa"}), (Streaming(), DENSE)],
)
def test_options_that_cannot_be_followed_are_counted_and_never_kill_the_worker(policy: Policy, xargs: Any) -> None:
    metrics.IGNORED_OPTIONS.labels(policy.name)  # is there from now on
    before = value("sparseserve_ignored_options_total", policy=policy.name)
    table = ServedRequests(policy, cast(Any, runner := Runner()))  # has what is read of one
    table.update(scheduled({"x": xargs}))
    runner.input_batch.req_ids = ["x"]
    (row,) = table.rows(batch(1))
    assert row is not None and row.plain
    assert value("sparseserve_ignored_options_total", policy=policy.name) == before + 1
