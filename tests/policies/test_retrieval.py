"""Retrieval heads: which heads they are, and what the others read."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.artifacts import load
from sparseserve.errors import ArtifactError
from sparseserve.model import ModelShape
from sparseserve.policies import Dense, Policy, Retrieval, Streaming
from sparseserve.testing.bed import Bed, Outcome
from sparseserve.types import HeadShape, Role
from tests.helpers.artifact_files import head_map, moa_plan

SINK, RECENT, PAGE = 8, 40, 64
MODEL = ModelShape("bed", 3, HeadShape(kv_heads=2, queries_per_kv=2, head_dim=32), max_len=448, page_size=PAGE)
COMPENSATE: dict[str, Any] = {"compensate": True, "kv_memory": "shared"}
LENGTHS = [448, 47, 48, 49, 300, 0, 1, 129]  # around sink + recent
MIXED, SWAPPED = [[1, 1], [1, 0], [0, 0]], [[0, 0], [0, 1], [1, 1]]


def chosen(policy: Retrieval, kv_heads: int = 2) -> list[list[bool]]:
    """The retrieval heads [L][H] of the whole model."""
    return policy.retrieval_heads(load(policy.artifact), kv_heads).tolist()


def decoded(policy: Policy, lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.bfloat16) -> Outcome:
    query, key, value = data(len(lengths), dtype)
    return Bed(policy, MODEL, lengths, dtype=dtype).fill(key, value).decode(query)


def data(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query [L, B, Hq, D], key and value [L, B, T, H, D]."""
    random, heads = torch.Generator().manual_seed(5), MODEL.heads
    query = torch.randn(MODEL.layers, rows, heads.query_heads, heads.head_dim, generator=random)
    key, value = torch.randn(2, MODEL.layers, rows, MODEL.max_len, heads.kv_heads, heads.head_dim, generator=random)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def test_a_kv_head_has_the_best_score_of_its_query_heads() -> None:
    file = head_map([[0.0, 0.3, 0.1, 0.0], [0.05, 0.0, 0.0, 0.2]], rule={"threshold": 0.2}, per="query_head")
    assert chosen(Retrieval(artifact=file)) == [[True, False], [False, True]]


def test_threshold_or_share_or_the_rule_of_the_artifact() -> None:
    file = head_map([[0.9, 0.5], [0.4, 0.1]], rule={"share": 0.5})
    assert chosen(Retrieval(artifact=file)) == [[True, True], [False, False]]
    assert chosen(Retrieval(artifact=file, threshold=0.4)) == [[True, True], [True, False]]
    assert chosen(Retrieval(artifact=file, share=0.25)) == [[True, False], [False, False]]


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.25, 2), (0.5, 4), (0.75, 6), (1, 8)])
def test_ties_go_to_the_lower_layer_and_head(share: float, count: int) -> None:
    flat = torch.tensor(chosen(Retrieval(artifact=head_map([[1, 1, 1, 1]] * 2), share=share), kv_heads=4)).flatten()
    assert flat.tolist() == [True] * count + [False] * (8 - count)


def test_two_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold and share exclude each other"):
        Retrieval(artifact="map", threshold=0.5, share=0.5)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ["Llama-2-7B-32K-Instruct", "Meta-Llama-3.1-8B-Instruct"])
def test_a_share_is_one_minus_the_sparsity_of_duo_attention(published: Path, name: str, share: float) -> None:
    folder = published / "duo" / name
    scores = load(folder).tensors["scores"]
    heads = torch.tensor(chosen(Retrieval(artifact=str(folder), share=share), scores.shape[1]))
    assert heads.sum() == share * scores.numel()
    at_least = scores.quantile(1 - share)
    assert (scores[heads] >= at_least).all() and (scores[~heads] <= at_least).all()


def test_layers_may_have_all_or_no_retrieval_heads() -> None:
    plans = Retrieval(artifact=head_map(MIXED)).plans(MODEL)
    assert [plan.role for plan in plans] == [Role.DENSE, Role.WINDOW, Role.WINDOW]
    assert [plan.role for plan in Retrieval(artifact=head_map(SWAPPED)).plans(MODEL)] == [
        Role.WINDOW,
        Role.WINDOW,
        Role.DENSE,
    ]


def test_streaming_heads_read_sink_and_recent_tokens() -> None:
    policy = Retrieval(artifact=head_map(MIXED), sink_tokens=SINK, recent_tokens=RECENT)
    for layer, mask in enumerate(decoded(policy).masks):
        for (row, length), head in product(enumerate(LENGTHS), range(mask.shape[1])):
            tokens = torch.arange(MODEL.max_len)
            kept = (tokens < SINK) | (tokens >= length - RECENT) | bool(MIXED[layer][head])
            assert torch.equal(mask[row, head], kept & (tokens < length))


def test_every_head_computes_what_it_would_alone() -> None:
    mixed = decoded(Retrieval(artifact=head_map(MIXED), sink_tokens=SINK, recent_tokens=RECENT)).out
    everything = decoded(Dense()).out
    streaming = decoded(Streaming(sink_tokens=SINK, recent_tokens=RECENT)).out
    for layer, head in product(range(3), range(4)):
        alone = everything if MIXED[layer][head // 2] else streaming
        assert torch.equal(mixed[layer, :, head], alone[layer, :, head])
    assert not torch.equal(everything, streaming)


@pytest.mark.parametrize(
    ("of_artifact", "given", "kept"),
    [
        ({}, {}, (64, 64 + 1024)),
        ({"sink_tokens": 128, "recent_tokens": 256}, {}, (128, 128 + 257)),  # 256 before the current one
        ({"sink_tokens": 128, "recent_tokens": 256}, {"sink_tokens": 4}, (4, 4 + 257)),
        ({"sink_tokens": 0, "recent_tokens": 0}, {}, (0, 1)),
    ],
)
def test_sink_and_recent_tokens_are_the_artifacts(
    of_artifact: dict[str, Any], given: dict[str, Any], kept: tuple[int, int]
) -> None:
    plan = Retrieval(artifact=head_map([[1, 0]] * 3, **of_artifact), **given).plans(replace(MODEL, max_len=8192))[0]
    assert plan.window is not None
    assert (plan.window.sink[1].item(), plan.window.alpha[1, 0].item()) == kept


def test_ranks_take_their_own_heads() -> None:
    policy = Retrieval(artifact=head_map([[1, 0, 1, 1], [0, 0, 0, 1]]))
    half = HeadShape(kv_heads=2, queries_per_kv=2, head_dim=32)
    plans = [policy.plans(ModelShape("m", 2, half, 8192, PAGE, rank=rank, ranks=2)) for rank in range(2)]
    assert [[plan.role for plan in rank] for rank in plans] == [[Role.WINDOW] * 2, [Role.DENSE, Role.WINDOW]]
    assert plans[1][1].window is not None and plans[1][1].window.beta.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compensation_token_is_the_mean_of_what_was_dropped(dtype: torch.dtype) -> None:
    lengths = [448, 129, 300, 193, 10, 0]
    policy = Retrieval(artifact=head_map(MIXED), sink_tokens=SINK, recent_tokens=RECENT, **COMPENSATE)
    outcome = decoded(policy, lengths, dtype)
    query, key, value = (x.double() for x in data(len(lengths), dtype))
    for layer, (row, length), head in product(range(3), enumerate(lengths), range(4)):
        keys, values = (x[layer, row, :length, head // 2] for x in (key, value))
        start = max(PAGE, (length - RECENT) // PAGE * PAGE)  # whole pages, after the one with the sink
        if not MIXED[layer][head // 2] and start > PAGE:
            middle = slice(PAGE, start)
            keys, values = (torch.cat([x[:PAGE], x[start:], x[middle].mean(0)[None]]) for x in (keys, values))
        weights = (keys @ query[layer, row, head] * MODEL.heads.head_dim**-0.5).softmax(0)
        atol = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(outcome.out[layer, row, head].double(), weights @ values, rtol=0, atol=atol)


def test_compensation_changes_the_heads_that_dropped_something_alone() -> None:
    policy = Retrieval(artifact=head_map(MIXED), sink_tokens=PAGE, recent_tokens=PAGE, **COMPENSATE)
    plain = decoded(Retrieval(artifact=head_map(MIXED), sink_tokens=PAGE, recent_tokens=PAGE), [256]).out
    changed = (decoded(policy, [256]).out != plain).any(-1)[:, 0]
    assert changed.tolist() == [[False] * 4, [False, False, True, True], [True] * 4]


def test_maps_of_other_models_and_other_kinds_are_refused() -> None:
    with pytest.raises(ArtifactError, match="layers = 1"):
        Retrieval(artifact=head_map([[1, 0]])).plans(MODEL)
    with pytest.raises(ArtifactError, match="kind retrieval.*--policy moa"):
        Retrieval(artifact=moa_plan([[0.0] * 4] * 3, [[0.5] * 4] * 3)).plans(MODEL)
