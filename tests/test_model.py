"""The shape of a model: which heads and layers a rank has."""

from __future__ import annotations

from itertools import chain

import pytest

from sparseserve.errors import ConfigError
from sparseserve.model import ModelShape
from sparseserve.types import HeadShape, Scope


def model(heads: int = 2, rank: int = 0, ranks: int = 1) -> ModelShape:
    return ModelShape("some/model", 6, HeadShape(heads, 4, 64), 4096, 64, rank, ranks)


@pytest.mark.parametrize(("kv_heads", "ranks"), [(8, 1), (8, 2), (8, 4), (8, 8), (6, 3)])
def test_ranks_share_the_heads_in_order(kv_heads: int, ranks: int) -> None:
    mine = [model(kv_heads // ranks, rank, ranks).my_heads(kv_heads) for rank in range(ranks)]
    assert [*chain.from_iterable(range(kv_heads)[part] for part in mine)] == [*range(kv_heads)]


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "heads"), [(2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0]), (4, 8, [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_ranks_have_copies_of_too_few_heads(kv_heads: int, ranks: int, heads: list[int]) -> None:
    assert [model(1, rank, ranks).my_heads(kv_heads) for rank in range(ranks)] == [
        slice(head, head + 1) for head in heads
    ]


@pytest.mark.parametrize(
    ("heads", "ranks", "fitting"),
    [(8, 1, {8}), (1, 1, {1}), (4, 2, {8}), (2, 4, {8}), (1, 4, {1, 2, 4}), (1, 6, {1, 2, 3, 6})],
)
def test_a_model_fits_by_what_it_gives_a_rank(heads: int, ranks: int, fitting: set[int]) -> None:
    assert {count for count in range(17) if model(heads, 0, ranks).fits_kv_heads(count)} == fitting


@pytest.mark.parametrize("count", [0, 1, 6])
def test_first_layers_may_be_all_layers(count: int) -> None:
    model().check_first_layers("dense_layers", count, default=2)


def test_more_first_layers_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        model().check_first_layers("wide_layers", 7, default=4)
    problem = error.value.problem
    assert (problem.key, problem.value) == ("wide_layers", 7)
    assert (problem.allowed, problem.remedy) == ("at most 6 (some/model has 6 layers)", "give --set wide_layers=4")


@pytest.mark.parametrize(("layer", "first"), [(0, 0), (5, 0), (3, 3), (5, 5)])
def test_a_layer_of_the_model_passes(layer: int, first: int) -> None:
    model().check_layer("select_layer", layer, first)


@pytest.mark.parametrize(("layer", "first"), [(6, 0), (-1, 0), (2, 3), (6, 3)])
def test_any_other_layer_is_refused(layer: int, first: int) -> None:
    with pytest.raises(ConfigError) as error:
        model().check_layer("reselect_layer", layer, first)
    problem = error.value.problem
    assert (problem.key, problem.value) == ("reselect_layer", layer)
    assert problem.allowed == f"a layer from {first} to 5 (some/model has 6 layers)"
    assert problem.remedy == "give --set reselect_layer=N with N in that range"


def test_selections_are_shared_by_all_heads_a_group_or_none() -> None:
    heads = HeadShape(kv_heads=3, queries_per_kv=4, head_dim=64)
    assert heads.query_heads == 12
    assert [heads.selection_heads(scope) for scope in (Scope.ALL_HEADS, Scope.KV_HEAD, Scope.QUERY_HEAD)] == [1, 3, 12]
