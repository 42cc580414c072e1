"""seer: gates as they were trained, over a cache of rotated keys."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve import ops, reference
from sparseserve.errors import ArtifactError, ConfigError, UnsupportedError
from sparseserve.model import ModelShape
from sparseserve.policies import Dense, Seer
from sparseserve.reference.gate import rotate, unrotate
from sparseserve.testing.bed import Bed, Outcome
from sparseserve.testing.gates import plain_rope, random_gates
from sparseserve.types import Gate, HeadShape, PageState, PageTable, Role
from tests.helpers.artifact_files import head_map, saved

LENGTHS = [639, 640, 641, 63, 64, 65, 0, 300]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "linear": {"rope_type": "linear", "factor": 4.0},
}


def shape(heads: int = 2, group: int = 4, dim: int = 32, layers: int = 2, page_size: int = 128) -> ModelShape:
    return ModelShape("model", layers, HeadShape(heads, group, dim), 768, page_size, rope=partial(plain_rope, 768))


MODEL = shape()
GATES = saved(random_gates(MODEL, gate_dim=48))


def draw(model: ModelShape, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [L, B, Hq, D], key and value [L, B, T, H, D]."""
    generator = torch.Generator().manual_seed(3)
    heads = model.heads
    query = torch.randn(model.layers, rows, heads.query_heads, heads.head_dim, generator=generator)
    key, value = torch.randn(2, model.layers, rows, model.max_len, heads.kv_heads, heads.head_dim, generator=generator)
    return query.bfloat16() * 2, key.bfloat16(), value.bfloat16()


def decode(policy: Seer | Dense, model: ModelShape = MODEL, lengths: list[int] = LENGTHS) -> tuple[Bed, Outcome]:
    query, key, value = draw(model, len(lengths))
    bed = Bed(policy, model, lengths).fill(key, value)
    return bed, bed.decode(query)


def shares(bed: Bed, layer: int, row: int, query: Tensor, gate: Gate) -> Tensor:
    """The gate's softmax [H, blocks] of one row, by its formulas; the last block has the rest."""
    length = bed.lengths[row]
    table = PageTable(bed.pages[row : row + 1], torch.tensor([length], dtype=torch.int32))
    scores = torch.zeros(1, bed.model.heads.kv_heads, -(-length // 64), dtype=torch.float64)
    summary = bed.layers[layer].page_state
    assert summary is not None
    reference.score_gates(query[layer, row][None], summary, table, 64, gate, scores, dtype=torch.float64)
    result = scores[0].exp()
    result[:, -1] = 1 - result[:, :-1].sum(1)
    return result


@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_the_best_blocks_and_the_last_within_the_budget(group: int) -> None:
    model = shape(group=group)
    policy = Seer(artifact=saved(random_gates(model, gate_dim=64)), budget_tokens=4 * 64 + 63)
    bed, outcome = decode(policy, model)
    query = draw(model, len(LENGTHS))[0]
    for layer, plan in enumerate(policy.plans(model)):
        assert plan.gate is not None
        for row, length in enumerate(LENGTHS):
            if length <= policy.budget_tokens:
                assert outcome.masks[layer][row, :, :length].all()
                continue
            gate = shares(bed, layer, row, query, plan.gate)
            best = gate[:, :-1].topk(3).indices  # with the last block, four
            expected = torch.zeros_like(gate, dtype=torch.bool).scatter(1, best, True)
            expected[:, -1] = True
            blocks = expected.repeat_interleave(64, 1)[:, :length]
            assert torch.equal(outcome.masks[layer][row, :, :length], blocks)


def test_a_threshold_takes_every_larger_share_and_the_last_block() -> None:
    threshold = 0.08
    policy = Seer(artifact=GATES, threshold=threshold, budget_tokens=64)
    bed, outcome = decode(policy)
    query = draw(MODEL, len(LENGTHS))[0]
    counts = set()
    for layer, plan in enumerate(policy.plans(MODEL)):
        assert plan.gate is not None
        for row, length in enumerate(LENGTHS):
            if length == 0:
                assert not outcome.masks[layer][row].any()
                continue
            chosen = shares(bed, layer, row, query, plan.gate) > threshold
            chosen[:, -1] = True
            assert torch.equal(outcome.masks[layer][row, :, :length], chosen.repeat_interleave(64, 1)[:, :length])
            counts |= set(chosen.sum(1).tolist())
    assert len(counts) > 3  # heads and rows take as many as they need
    assert policy.dense_up_to == policy.min_tokens
    assert policy.expected_tokens(policy.plans(MODEL)[0], 5000) == 5000


def test_a_threshold_sees_one_row_at_a_time() -> None:
    bed, whole = decode(Seer(artifact=GATES, threshold=0.08))
    query = draw(MODEL, len(LENGTHS))[0]
    for row in range(len(LENGTHS)):
        assert torch.equal(bed.decode(query, [row]).out[:, 0], whole.out[:, row])


def test_rows_that_share_a_prefix_share_its_summaries() -> None:
    query, key, value = draw(MODEL, 2)
    key[:, 1, :512], value[:, 1, :512] = key[:, 0, :512], value[:, 0, :512]
    policy = Seer(artifact=GATES, budget_tokens=256)
    apart = Bed(policy, MODEL, [700, 600]).fill(key, value).decode(query)
    shared = Bed(policy, MODEL, [700, 600])
    shared.pages[1, :4] = shared.pages[0, :4]
    for layer in range(MODEL.layers):
        shared.write(layer, 0, 0, key[layer, 0, :700], value[layer, 0, :700])
        shared.write(layer, 1, 512, key[layer, 1, 512:600], value[layer, 1, 512:600])
    assert torch.equal(shared.decode(query).out, apart.out)


def test_the_published_shape() -> None:
    """Heads of Qwen3-4B, one layer."""
    model = shape(heads=8, group=4, dim=128, layers=1)
    policy = Seer(artifact=saved(random_gates(model)), budget_tokens=256)
    assert policy.page_state(model.heads, 128) == PageState((8, 2, 128), torch.float32)
    _, outcome = decode(policy, model, [700])
    assert (outcome.attended[0] <= 256).all() and (outcome.attended[0] > 192).all()


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ROPES)
def test_unrotated_keys_are_those_before_the_rotation(kind: str) -> None:
    """Rotated by vLLM, kept in bfloat16, un-rotated: the same keys and the same choice of blocks."""
    table, rotated = vllm_rotation(kind, 128)
    model = replace(shape(dim=128, group=1), rope=lambda dim: vllm_rotation(kind, dim)[0], max_len=2048)
    gate = Seer(artifact=saved(random_gates(model))).plans(model)[0].gate
    assert gate is not None and gate.rope is not None and torch.equal(gate.rope, table)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(2, 32, 128, generator=generator)
    plain = torch.randn(2, 2048, 128, generator=generator) + blocks.repeat_interleave(64, 1)
    cached = rotated(plain).bfloat16()
    back = unrotate(cached.float(), gate.unrope)
    assert (back - plain).abs().max() < 2**-7 * plain.abs().max()
    queries = torch.randn(50, 2, 128, generator=generator)
    trained = replace(gate, unrope=torch.cat([torch.ones(2048, 64), torch.zeros(2048, 64)], 1))
    exact, served = choices(trained, plain, queries), choices(gate, cached, rotate(queries, table[-1]).bfloat16())
    assert (exact & served).sum() >= 0.99 * exact.sum()


def vllm_rotation(kind: str, dim: int) -> tuple[Tensor, Any]:
    """The table of vLLM's rotary embedding, and the embedding of keys [H, T, D] at positions 0 to T - 1."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        parameters = ROPES[kind] | {"rope_theta": 10000.0}
        rope = get_rope(dim, 2048, rope_parameters=parameters, dtype=torch.float32)

    def rotated(keys: Tensor) -> Tensor:
        flat = keys.transpose(0, 1).flatten(1)
        _, turned = rope.forward_native(torch.arange(keys.shape[1]), flat.clone(), flat.clone())
        assert turned is not None
        return turned.view(len(turned), -1, dim).transpose(0, 1)

    return rope.cos_sin_cache[:2048].clone(), rotated


def choices(gate: Gate, keys: Tensor, queries: Tensor) -> Tensor:
    """Which of the 31 blocks before the last are among the best 8, [B, H, 31]: keys [H, T, D], queries [B, H, D]."""
    paged = keys.unflatten(1, (-1, 64)).transpose(0, 1)  # [M, H, 64, D]
    paged = paged.transpose(2, 3).contiguous().transpose(2, 3)
    summary = torch.zeros(len(paged), 2, 1, gate.key.shape[2])
    token = torch.arange(keys.shape[1])
    ops.summarize_gates(paged, token, token, gate, summary)
    rows = len(queries)
    pages = torch.arange(len(paged)).int().repeat(rows, 1)
    table = PageTable(pages, torch.full((rows,), keys.shape[1], dtype=torch.int32))
    scores = ops.score_gates(queries, summary, table, 64, gate)[..., :-1]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(8).indices, True)


def test_ranks_have_the_heads_of_the_whole() -> None:
    whole = shape(heads=4)
    policy = Seer(artifact=saved(random_gates(whole)))
    ranks = [replace(shape(heads=2), rank=rank, ranks=2) for rank in range(2)]
    for layer, plan in enumerate(policy.plans(whole)):
        gates = [policy.plans(rank)[layer].gate for rank in ranks]
        assert plan.gate is not None and gates[0] is not None and gates[1] is not None
        assert torch.equal(torch.cat([gate.query for gate in gates if gate]), plan.gate.query)
        assert torch.equal(torch.cat([gate.key for gate in gates if gate]), plan.gate.key)


@pytest.mark.parametrize(("asked", "trained", "dense"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 2)])
def test_dense_layers(asked: int, trained: int, dense: int) -> None:
    gates = random_gates(MODEL)
    gates.arguments["start_layer"] = trained
    plans = Seer(artifact=saved(gates), dense_layers=asked).plans(MODEL)
    assert [plan.role for plan in plans] == [Role.DENSE] * dense + [Role.SELECT] * (2 - dense)
    assert [plan.gate is None for plan in plans] == [True] * dense + [False] * (2 - dense)


# Twice as many ranks as KV heads: vLLM gives each a copy of a KV head, and half of its query heads.
HALF_A_GROUP = replace(MODEL.heads, kv_heads=1, queries_per_kv=MODEL.heads.queries_per_kv // 2)
REPLICATED = replace(MODEL, heads=HALF_A_GROUP, ranks=4)


@pytest.mark.parametrize(
    ("changes", "model", "error", "told"),
    [
        ({"budget_tokens": 63}, MODEL, ConfigError, ["budget_tokens = 63", "at least 64"]),
        ({"budget_tokens": 80, "sink_tokens": 20}, MODEL, ConfigError, ["budget_tokens = 80", "at least 84"]),
        ({"dense_layers": 3}, MODEL, ConfigError, ["dense_layers = 3", "at most 2"]),
        ({}, shape(page_size=96), UnsupportedError, ["--block-size = 96", "multiple of 64", "--block-size 128"]),
        ({}, REPLICATED, UnsupportedError, ["--tensor-parallel-size = 4", "at most 2"]),
        ({}, replace(MODEL, rope=None), UnsupportedError, ["rotary position embedding"]),
        ({}, shape(heads=4, layers=3), ArtifactError, ["layers", "KV heads"]),
        ({"artifact": "nowhere"}, MODEL, ArtifactError, ["nowhere"]),
        ({"artifact": head_map([[1.0, 0.0]])}, MODEL, ArtifactError, ["--policy retrieval"]),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], model: ModelShape, error: type[Exception], told: list[str]
) -> None:
    with pytest.raises(error) as refused:
        Seer(**{"artifact": GATES} | changes).plans(model)
    assert [words for words in told if words not in str(refused.value)] == []


@pytest.mark.parametrize(("key", "value"), [("gate_dim", 24), ("gate_dim", 272), ("block_size", 40)])
def test_gates_that_the_kernels_do_not_compute_are_refused(key: str, value: int) -> None:
    gates = random_gates(MODEL, **{"block_size": 64, "gate_dim": 64, key: value})
    with pytest.raises(ArtifactError, match=f"{key} = {value} is refused. Expected: a multiple of 16"):
        Seer(artifact=saved(gates)).plans(MODEL)
