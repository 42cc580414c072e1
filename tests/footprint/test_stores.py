"""What rows store, against numbers worked out by hand and pages counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sparseserve.footprint.groups import HeadWindow
from sparseserve.footprint.planned import plan_model
from sparseserve.footprint.stores import HeadGroup, Memory, StepFootprint, needed_bytes
from sparseserve.model import ModelShape
from sparseserve.policies import Dense, Moa, Policy, Quest, Retrieval, Streaming
from sparseserve.testing.plans import write_head_map, write_moa_plan
from sparseserve.types import HeadShape

P, LENGTH = 128, 32768
MODEL = ModelShape(
    "m", layers=6, heads=HeadShape(kv_heads=4, queries_per_kv=2, head_dim=64), max_len=LENGTH, page_size=P
)
SLOT = P * 2 * 64 * 2  # bytes of a page's tokens of one KV head
DENSE = 24 * SLOT


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], Policy]:
    heads = write_head_map(tmp_path / "heads.json", {(0, 0), (1, 1), (2, 2), (3, 3)})
    plan = write_moa_plan(tmp_path / "plan.json", lambda head: (64 + 32 * head[0], 0.03 * (1 + head[1])))
    made: dict[str, Policy] = {
        "dense": Dense(),
        "quest": Quest(),
        "streaming": Streaming(),
        "streaming-shared": Streaming(kv_memory="shared"),
        "retrieval": Retrieval(artifact=heads, sink_tokens=64, recent_tokens=192),
        "moa": Moa(artifact=plan, min_tokens=500),
    }
    return made.__getitem__


def memory(policy: Policy) -> Memory:
    return plan_model(policy, MODEL, element_bytes=2).memory(0)


def test_streaming_stores_its_sink_and_its_window(policy: Callable[[str], Policy]) -> None:
    row = memory(policy("streaming")).row(LENGTH)
    assert (row.full, row.window, row.page_state) == (0, 9 * DENSE, 0)  # a page of the sink, 1020 tokens in 8 more
    assert row.dense == 256 * DENSE and row.ratio == pytest.approx(256 / 9)


def test_short_rows_store_everything(policy: Callable[[str], Policy]) -> None:
    stored = memory(policy("retrieval"))
    assert [group.ends(1024) for group in stored.groups] == [None, None]
    assert stored.row(1024).window == 5 * stored.row(1024).full  # 20 heads beside 4
    assert stored.row(1025).window < stored.row(1024).window


def test_retrieval_heads_fill_a_page_and_the_others_five(policy: Callable[[str], Policy]) -> None:
    stored = memory(policy("retrieval"))
    assert [(group.heads, group.tables) for group in stored.groups] == [(4, 1), (20, 5)]
    assert stored.slots == 4 and stored.page_bytes == 6 * P * 86 * 2  # 512 numbers of a token, in six equal parts
    row = stored.row(LENGTH)
    assert (row.full, row.window) == (256 * stored.page_bytes, 5 * 3 * stored.page_bytes)
    assert stored.groups[1].ends(LENGTH) == (64, 192)


@pytest.mark.parametrize(("name", "ratio"), [("dense", 1.0), ("streaming-shared", 1.0), ("quest", 32 / 33)])
def test_shared_pages_gain_nothing_and_summaries_cost(policy: Callable[[str], Policy], name: str, ratio: float) -> None:
    row = memory(policy(name)).row(LENGTH)
    assert (row.full, row.window, row.dense) == (256 * DENSE, 0, 256 * DENSE)
    assert row.ratio == pytest.approx(ratio)


def test_rounding_costs_what_heads_alone_would_not_need(policy: Callable[[str], Policy]) -> None:
    moa = policy("moa")
    stored, plans = memory(moa), moa.plans(MODEL)
    for length in (400, 501, 2048, 8191, LENGTH):
        kept = stored.row(length).full + stored.row(length).window
        assert kept >= needed_bytes(moa, plans, MODEL, 2, length)
    assert needed_bytes(moa, plans, MODEL, 2, 400) == 4 * DENSE
    windows = (64 + 32 * layer + 0.03 * (1 + head) * LENGTH for layer in range(6) for head in range(4))
    least = sum(window * SLOT / P for window in windows)
    assert least <= needed_bytes(moa, plans, MODEL, 2, LENGTH) <= least + 24 * 3 * SLOT


def test_capacity_is_what_rows_fit(policy: Callable[[str], Policy]) -> None:
    assert memory(policy("streaming")).capacity(90, LENGTH) == (10 * LENGTH, 90 * P)
    assert memory(policy("quest")).capacity(320, LENGTH) == (320 * P, 330 * P)


WINDOWS = [
    HeadWindow(4, 300.0, 0.0),
    HeadWindow(40, 100.0, 0.2, 64),
    HeadWindow(0, 33.5, 0.6, 10, 700),
    HeadWindow(130, -20.0, 0.1, 50),
]
TABLES = 2, 1, 3, 1
PAGE = 32
GROUPS = HeadGroup(None, 8, 1), *(HeadGroup(window, 8, tables) for window, tables in zip(WINDOWS, TABLES, strict=True))
STEPS = StepFootprint(Memory(GROUPS, PAGE, slots=8, page_bytes=1, page_state_bytes=0, dense_bytes=1))


def test_many_rows_at_once_free_what_each_does() -> None:
    lengths = range(2500)
    one_by_one = [
        sum(tables * window.freed_pages(length, PAGE) for window, tables in zip(WINDOWS, TABLES, strict=True))
        for length in lengths
    ]
    assert STEPS.freed(torch.tensor([*lengths])).tolist() == one_by_one


def test_rows_hold_what_no_token_before_the_step_needed_no_more() -> None:
    """A prompt in chunks, an answer, and a row whose first 640 tokens were found in the cache."""
    rows = [0, 200, 456, 700, 956, 1000, *range(1001, 1100)], [640, 1000, *range(1001, 1100)]
    windows = [*zip(WINDOWS, TABLES, strict=True)]
    tables = [(None, 1), *windows]
    for ends in rows:
        gone = [sum(times * window.freed_pages(ends[0] + 1, PAGE) for window, times in windows)]
        for before, after in pairwise(ends):
            held, freed = STEPS.hold(torch.tensor([before]), torch.tensor([after]))
            kept = [
                times * len(set(range(-(-after // PAGE))) - (dropped(window, before) if window else set()))
                for window, times in tables
            ]
            assert (held.full, held.window, held.dense) == (kept[0], sum(kept[1:]), kept[0])
            gone.append(gone[-1] + freed)
        assert gone[-1] == sum(times * window.freed_pages(ends[-1] + 1, PAGE) for window, times in windows)


def dropped(window: HeadWindow, before: int) -> set[int]:
    """Pages that the token after `before` others does not attend to."""
    return {
        page
        for page in range(before // PAGE)
        if window.sink <= page * PAGE and (page + 1) * PAGE <= window.start(before + 1)
    }


def test_rows_of_a_step_add_up() -> None:
    before, after = torch.tensor([0, 1500, 80]), torch.tensor([256, 1501, 81])
    together = STEPS.hold(before, after)
    alone = [STEPS.hold(before[row : row + 1], after[row : row + 1]) for row in range(3)]
    assert together[0].bytes == sum(held.bytes for held, _ in alone)
    assert together[1] == sum(freed for _, freed in alone)
