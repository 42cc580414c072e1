"""Streaming: just the first and the last tokens, and when that is everything after all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from sparseserve.policies import Streaming
from sparseserve.testing.bed import Bed
from sparseserve.types import Role
from tests.helpers.contract import LENGTHS, MODEL
from tests.helpers.laws import Data

SINK, RECENT = 5, 100


def streaming(**changes: Any) -> Streaming:
    return Streaming(**{"sink_tokens": SINK, "recent_tokens": RECENT, "min_tokens": 0} | changes)


def window(max_len: int, **changes: Any) -> tuple[int, int]:
    """End of the first and start of the last tokens in a row of `max_len`, the longest that there is."""
    policy = streaming(**changes)
    plan, *others = policy.plans(replace(MODEL, max_len=max_len))
    assert plan.role is Role.WINDOW and plan.window is not None
    assert [other.window for other in others] == [plan.window] * 4 or policy.frees_pages
    sink, start = plan.window.at(max_len)
    return int(sink), int(start)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("memory", ["shared", "per_head"])
@pytest.mark.parametrize("sink", [0, SINK, 70])
def test_sink_and_recent_tokens_and_no_others(memory: str, sink: int, data: Data) -> None:
    policy = streaming(kv_memory=memory, sink_tokens=sink)
    query, key, value = (part[:1] for part in data)
    outcome = Bed(policy, replace(MODEL, layers=1), LENGTHS).fill(key, value).decode(query)
    for row, length in enumerate(LENGTHS):
        tokens = [token for token in range(length) if token < sink or token >= length - RECENT]
        assert outcome.masks[0][row, 0].nonzero().flatten().tolist() == tokens
        assert outcome.attended[0][row].tolist() == [len(tokens)]


@pytest.mark.parametrize(
    ("max_len", "recent", "start"),
    [
        (448, 320, 128),  # the page of tokens 64 to 127 is free
        (448, 321, SINK),  # no page is: the rest begins where the sink ends
        (449, 321, 128),
        (448, 2000, SINK),
    ],
)
def test_heads_that_would_free_no_page_attend_to_what_they_store(max_len: int, recent: int, start: int) -> None:
    assert window(max_len, recent_tokens=recent) == (SINK, start)
    shared = max(0, max_len - recent)
    assert window(max_len, recent_tokens=recent, kv_memory="shared") == (SINK, shared)


@pytest.mark.parametrize(("min_tokens", "dense"), [(0, 105), (105, 105), (1024, 1024)])
def test_rows_up_to_sink_and_recent_tokens_are_dense(min_tokens: int, dense: int) -> None:
    policy = streaming(min_tokens=min_tokens, kv_memory="shared")
    (plan, *_) = policy.plans(MODEL)
    assert policy.dense_up_to == policy.row_dense_up_to(None) == dense
    read = [policy.expected_tokens(plan, length) for length in (dense - 1, dense, dense + 1, 9 * dense)]
    assert read == [dense - 1, dense, 105 if dense > 105 else dense, 105]


def test_a_budget_is_sink_and_recent_tokens_together() -> None:
    policy = streaming()
    assert policy.budget == 105 and policy.at_budget(512) == {"recent_tokens": 507}
    assert streaming(**policy.at_budget(512)).budget == 512
    assert policy.budgets is None  # no request has one of its own


def test_what_is_freed_cannot_be_measured() -> None:
    with pytest.raises(ValidationError, match="kv_memory = per_head frees; give kv_memory=shared"):
        streaming(recall_sample=0.5)
    shared = streaming(recall_sample=0.5, kv_memory="shared")
    assert not shared.frees_pages and streaming().frees_pages
