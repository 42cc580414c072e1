"""Quest: what its summaries promise, and what is selected by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.errors import ConfigError
from sparseserve.policies import Quest
from sparseserve.testing.bed import Bed
from sparseserve.types import Bound, HeadShape, PageState, PageTable, Role
from tests.helpers.contract import LENGTHS, MODEL

UNIT = 16
LAYER = replace(MODEL, layers=1)
HEADS = MODEL.heads
ROWS = [row for row, length in enumerate(LENGTHS) if length > UNIT]  # with a unit before the last one


def quest(**changes: Any) -> Quest:
    return Quest(**{"unit_tokens": UNIT, "dense_layers": 0, "sink_tokens": 0, "recent_tokens": 1} | changes)


def draw(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Query [1, B, Hq, D] and key [1, B, T, H, D], each channel with a mean and a width of its own."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(1, rows, HEADS.query_heads, HEADS.head_dim, generator=random)
    mean, width = torch.randn(2, 1, rows, 1, HEADS.kv_heads, HEADS.head_dim, generator=random)
    key = torch.randn(1, rows, MODEL.max_len, HEADS.kv_heads, HEADS.head_dim, generator=random)
    return query, mean + width * key


def scored(bound: Bound, query: Tensor, key: Tensor) -> Tensor:
    """What the policy gives the units [B, H, units] of rows of LENGTHS, in fp32."""
    bed = Bed(quest(bound=bound), LAYER, LENGTHS, dtype=torch.float32).fill(key, key)
    step = bed.buffers.step(PageTable(bed.pages, torch.tensor(LENGTHS, dtype=torch.int32)))
    bed.policy.select(bed.layers[0], query[0], step)
    return step.scores


def complete_units(query: Tensor, key: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Queries [H, G, D] and keys [H, units, UNIT, D] in fp64, of the units before the last one."""
    units = (LENGTHS[row] - 1) // UNIT
    keys = key[0, row, : units * UNIT].double().transpose(0, 1)
    queries = query[0, row].double().view(HEADS.kv_heads, -1, HEADS.head_dim)
    return queries, keys.reshape(HEADS.kv_heads, units, UNIT, -1)


@pytest.mark.parametrize("seed", range(3))
def test_min_max_never_scores_a_unit_below_its_best_key(seed: int) -> None:
    query, key = draw(seed, len(LENGTHS))
    scores = scored(Bound.MIN_MAX, query, key)
    for row in ROWS:
        queries, keys = complete_units(query, key, row)
        best = torch.einsum("hgd,hutd->hugt", queries, keys).amax((2, 3))
        assert (scores[row, :, : best.shape[1]] >= best - 1e-4).all()


def test_mean_std_is_the_mean_and_a_deviation_in_every_channel() -> None:
    query, key = draw(0, len(LENGTHS))
    scores = scored(Bound.MEAN_STD, query, key)
    for row in ROWS:
        queries, keys = complete_units(query, key, row)
        mean, std = keys.mean(2), keys.std(2, correction=0)
        expected = (queries @ mean.mT + queries.abs() @ std.mT).amax(1)  # the largest over a KV head's query heads
        torch.testing.assert_close(scores[row, :, : expected.shape[1]].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dense", [0, 2, 5])
def test_the_first_layers_are_dense(dense: int) -> None:
    roles = [(plan.role, plan.dense_output) for plan in quest(dense_layers=dense).plans(MODEL)]
    assert roles == [(Role.DENSE, True)] * dense + [(Role.SELECT, False)] * (5 - dense)


def selected(bound: Bound, lengths: list[int], query: Tensor, key: Tensor) -> Tensor:
    """The tokens [B, H, T] bool that rows read with a budget of two units beside the current token."""
    policy = quest(bound=bound, budget_tokens=1 + 2 * UNIT)
    query, key = query.bfloat16(), key.bfloat16()
    return Bed(policy, LAYER, lengths).fill(key, key).decode(query).masks[0]


def units(mask: Tensor) -> list[int]:
    """The units that a head reads tokens of."""
    return sorted({token // UNIT for token in mask.nonzero().flatten().tolist()})


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bound", Bound)
@pytest.mark.parametrize("length", [300, 304])  # within a unit, and at its end
def test_the_last_unit_is_selected_though_no_key_matches_less(bound: Bound, length: int) -> None:
    query, key = torch.ones(1, 1, HEADS.query_heads, HEADS.head_dim), draw(1, 1)[1]
    key[:, :, 288:] = -50
    for mask in selected(bound, [length], query, key)[0]:
        best, last = units(mask)
        assert best < last == 18 and mask[288:length].all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bound", Bound)
@pytest.mark.parametrize("head", range(HEADS.kv_heads))
def test_the_unit_of_a_needle_is_selected_by_the_head_that_sees_it(bound: Bound, head: int) -> None:
    lengths, at = [448, 448, 300], [100, 31, 287]
    query, key = draw(2, 3)[0], torch.zeros(1, 3, MODEL.max_len, HEADS.kv_heads, HEADS.head_dim)
    for row, token in enumerate(at):
        key[0, row, token, head] = query[0, row, head * HEADS.queries_per_kv]
    mask = selected(bound, lengths, query, key)
    assert [units(mask[row, head]) for row in range(3)] == [[6, 27], [1, 27], [17, 18]]
    assert [units(mask[row, 1 - head]) for row in range(3)] == [[0, 27], [0, 27], [0, 18]]  # of equal units the first


@pytest.mark.parametrize("unit", [16, 32, 64])
def test_a_page_keeps_two_vectors_for_every_unit_and_kv_head(unit: int) -> None:
    policy, heads = quest(unit_tokens=unit), HeadShape(kv_heads=3, queries_per_kv=4, head_dim=80)
    assert policy.page_state(heads, 128) == PageState((3, 128 // unit, 2, 80))
    assert [policy.page_state_bytes(heads, 128, size) for size in (2, 4)] == [3 * 128 // unit * 160 * n for n in (2, 4)]


def test_more_dense_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        quest(dense_layers=6).plans(MODEL)
    problem = error.value.problem
    assert (problem.key, problem.value, problem.allowed) == ("dense_layers", 6, "at most 5 (bed has 5 layers)")
    assert problem.remedy == "give --set dense_layers=2"
