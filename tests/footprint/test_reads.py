"""What a step reads, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from sparseserve.footprint.reads import RoleCost, StepCost, step_cost
from sparseserve.model import ModelShape
from sparseserve.policies import Dense, Hip, Policy, Quest, Streaming, Tidal
from sparseserve.types import HeadShape, Role, Scope

MODEL = ModelShape(
    "m", layers=6, heads=HeadShape(kv_heads=4, queries_per_kv=2, head_dim=64), max_len=65536, page_size=128
)
KEY = 4 * 64 * 2  # bytes of a token's bf16 keys in one layer
LENGTH = 32768


def cost(policy: Policy, length: int = LENGTH) -> StepCost:
    return step_cost(policy, policy.plans(MODEL), MODEL, length, element_bytes=2)


def test_dense_reads_everything() -> None:
    step = cost(Dense())
    assert step.roles == (RoleCost(Role.DENSE, 6, LENGTH, 6 * LENGTH * 2 * KEY, 0),)
    assert step.ratio == 1


def test_streaming_reads_its_window() -> None:
    step = cost(Streaming(sink_tokens=4, recent_tokens=1020))
    assert step.bytes == 6 * 1024 * 2 * KEY
    assert step.ratio == 32


def test_quest_reads_the_summaries_of_its_selecting_layers() -> None:
    dense, select = cost(Quest(budget_tokens=2048, unit_tokens=32)).roles
    assert (dense.layers, dense.bytes) == (2, 2 * LENGTH * 2 * KEY)
    assert (select.layers, select.tokens, select.kv_bytes) == (4, 2048, 4 * 2048 * 2 * KEY)
    assert select.scored_bytes == 4 * LENGTH // 32 * (4 * 2 * 64 * 2)  # two vectors for every unit and head


def test_tidal_reads_the_keys_of_its_selection_layers_twice() -> None:
    dense, select, reuse = cost(Tidal(reselect_layer=(4,))).roles
    assert (dense.layers, select.layers, reuse.layers) == (2, 2, 2)
    assert select.bytes == 2 * LENGTH * 3 * KEY
    assert reuse.bytes == 2 * 1024 * 2 * KEY


def test_query_heads_that_choose_alone_share_no_read() -> None:
    alone = cost(Tidal(reselect_layer=(4,), scope=Scope.QUERY_HEAD)).roles
    shared = cost(Tidal(reselect_layer=(4,))).roles
    assert alone[2].kv_bytes == 2 * shared[2].kv_bytes
    assert alone[1] == shared[1]  # dense all the same


@pytest.mark.parametrize("policy", [Quest(), Streaming(), Tidal(reselect_layer=(4,))], ids=lambda policy: policy.name)
def test_short_rows_are_dense(policy: Policy) -> None:
    assert cost(policy, 1024).ratio == 1
    assert cost(policy, 1025).ratio != 1


def test_hip_searches_nothing_where_the_budget_holds_the_row() -> None:
    assert cost(Hip(wide_layers=6), 4096).bytes == 6 * 4096 * 2 * KEY


def test_hip_reads_the_keys_it_probes_and_one_state() -> None:
    policy = Hip(wide_layers=0)
    for length, keys in {  # chunks x probes / steps of the stages that do not keep everything
        8192: (8192 - 256 - 768) / 8 * 8 / 8,
        32768: (32768 - 256 - 768) / 32 * 12 / 16 + 8192 / 8 * 8 / 8,
        65536: (65536 - 256 - 768) / 256 * 18 / 32 + 32768 / 32 * 12 / 16 + 8192 / 8 * 8 / 8,
    }.items():
        (select,) = cost(policy, length).roles
        assert select.scored_bytes == 6 * (keys * KEY + policy.page_state_bytes(MODEL.heads, MODEL.page_size, 2))
        assert select.kv_bytes == 6 * 3328 * 2 * KEY
