"""Gates that train are the gates that are served; what they learn from is what the dense model attends to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparseserve import reference
from sparseserve.calibration.seer.features import draw_rows, features
from sparseserve.calibration.seer.gate import Gates
from sparseserve.calibration.seer.recall import best_blocks, held
from sparseserve.calibration.seer.rope import rotations
from sparseserve.calibration.subject import load
from sparseserve.errors import UnsupportedError
from sparseserve.reference.gate import pool, rotate
from sparseserve.testing.gates import plain_rope
from sparseserve.types import Gate, HeadShape, PageTable

RandomModel = Callable[..., Path]
BLOCK, TOKENS = 16, 147
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}


def parameters(kind: str) -> dict[str, Any]:
    return ROPES[kind] | {"rope_theta": 10000.0}


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize(("qk_norm", "rope"), [(True, True), (False, True), (True, False)])
def test_the_gate_that_trains_is_the_one_that_is_served(group: int, qk_norm: bool, rope: bool) -> None:
    heads, gate_dim = HeadShape(2, group, 32), 48
    gates = Gates(2, heads, gate_dim, qk_norm, seed=1)
    for norm in (gates.query_norm, gates.key_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm, 0.5, 2)
    unrope, turns = plain_rope(TOKENS, 32), plain_rope(TOKENS, gate_dim) if rope else None
    generator = torch.Generator().manual_seed(2)
    key, rows = torch.randn(2, TOKENS, 32, generator=generator), torch.tensor([16, 31, 32, 100, 146])
    query = torch.randn(len(rows), heads.query_heads, 32, generator=generator)
    pooled = pool(key[:, : TOKENS // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)))
    with torch.no_grad():
        shares = gates(query.expand(2, -1, -1, -1), pooled.expand(2, -1, -1, -1), rows, BLOCK, turns)
    for layer in range(2):
        norms = [None if norm is None else norm[layer] for norm in (gates.query_norm, gates.key_norm)]
        gate = Gate(gates.query[layer].data, gates.key[layer].data, norms[0], norms[1], unrope, turns)
        for index, position in enumerate(rows.tolist()):
            served = served_scores(gate, rotate(key, unrope), rotate(query[index], unrope[position]), position)
            assert served.shape[1] == position // BLOCK
            torch.testing.assert_close(shares[layer, index, :, : served.shape[1]], served, rtol=1e-3, atol=1e-4)
            assert (shares[layer, index, :, served.shape[1] :] == -torch.inf).all()


def served_scores(gate: Gate, key: Tensor, query: Tensor, position: int) -> Tensor:
    """The log-softmax [H, blocks] over the blocks before that of `position`, by the reference of the served ops.

    key [H, T, D] and query [Hq, D] after their rotation.
    """
    length = position + 1
    pages = torch.nn.functional.pad(key[:, :length], (0, 0, 0, -length % BLOCK)).unflatten(1, (-1, BLOCK))
    paged, tokens = pages.transpose(0, 1).contiguous(), torch.arange(length)
    summary = torch.zeros(len(paged), len(key), 1, gate.key.shape[2])
    reference.summarize_gates(paged, tokens, tokens, gate, summary)
    table = PageTable(torch.arange(len(paged)).int()[None], torch.tensor([length], dtype=torch.int32))
    scores = reference.score_gates(query[None], summary, table, BLOCK, gate)[0]
    return scores[:, : position // BLOCK].log_softmax(1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_targets_are_the_block_maxima_of_the_attention_matrix(family: str, random_model: RandomModel) -> None:
    path = random_model(family)
    subject, ids = load(str(path)), list(range(1, TOKENS + 1))
    rows = draw_rows(TOKENS, 40, seed=0)
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        matrices = eager(subject.tensor(ids), output_attentions=True).attentions
    whole = TOKENS // BLOCK
    found = features(subject, ids, rows, BLOCK, rotations(subject, TOKENS, 16)[0])
    for layer, matrix in zip(found, matrices, strict=True):
        blocks = matrix[0][:, rows, : whole * BLOCK].unflatten(0, (2, 2)).unflatten(3, (whole, BLOCK))
        earlier = torch.arange(whole) < (rows // BLOCK)[:, None]
        best = (blocks.amax(4).amax(1) * earlier).transpose(0, 1)
        torch.testing.assert_close(layer.target, best / best.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5)
        mass = (blocks.sum(4).mean(1) * earlier).transpose(0, 1)
        torch.testing.assert_close(layer.mass, mass, rtol=1e-3, atol=1e-5)
        oracle = held(layer.mass[None], layer.mass[None], rows, BLOCK)
        for scores in (layer.target, layer.mean_key, torch.rand(layer.mass.shape)):
            assert (held(scores[None], layer.mass[None], rows, BLOCK) <= oracle + 1e-6).all()


@pytest.mark.parametrize("kind", ROPES)
def test_queries_and_keys_are_those_before_the_rotation(kind: str, random_model: RandomModel) -> None:
    subject, ids = load(str(random_model("qwen3", rope_parameters=parameters(kind)))), list(range(1, 97))
    plain: dict[str, Tensor] = {}
    attention = subject.model.model.layers[1].self_attn
    for name in ("q_norm", "k_norm"):
        getattr(attention, name).register_forward_hook(lambda m, i, out, name=name: plain.update({name: out[0]}))
    rows = torch.tensor([50, 60, 95])
    found = features(subject, ids, rows, BLOCK, rotations(subject, 96, 16)[0])[1]
    torch.testing.assert_close(found.query, plain["q_norm"][rows], rtol=1e-3, atol=1e-4)
    keys = plain["k_norm"].transpose(0, 1).unflatten(1, (6, BLOCK))
    torch.testing.assert_close(found.pooled, pool(keys), rtol=1e-3, atol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ROPES)
def test_rotations_are_those_that_vllm_serves_with(kind: str, random_model: RandomModel) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    subject = load(str(random_model("llama", rope_parameters=parameters(kind))))
    unrope, rope = rotations(subject, 200, 48)
    with set_current_vllm_config(VllmConfig()):
        own, gates = (get_rope(dim, 4096, rope_parameters=parameters(kind), dtype=torch.float32) for dim in (16, 48))
    torch.testing.assert_close(rope, gates.cos_sin_cache[:200], rtol=1e-4, atol=1e-4)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        reference.gate.unrotate(rotate(x, own.cos_sin_cache[:200]), unrope), x, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 64, "num_key_value_heads": 4}, "0 rotary embeddings"),
        ("phi", {}, "a rotation of 8 of 16 dims"),
        ("cohere", {}, "another rotation"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_other_position_embeddings_are_refused(
    family: str, changes: dict[str, Any], said: str, random_model: RandomModel
) -> None:
    subject = load(str(random_model(family, **changes)))
    with pytest.raises(UnsupportedError, match=said):
        rotations(subject, 64, 16)


def test_recall_by_hand() -> None:
    """Of 24 blocks before the row's own, the three best hold 0.2 + 0.05 of the 0.5 that the three heaviest hold."""
    mass = torch.zeros(1, 1, 1, 30)
    mass[..., [1, 5, 9, 20]] = torch.tensor([0.2, 0.2, 0.1, 0.05])
    mass[..., 24] = 0.4  # the row's own block, which no score may choose
    scores = torch.zeros_like(mass)
    scores[..., [5, 20, 3, 24]] = torch.tensor([3.0, 2.0, 1.0, 9.0])
    rows = torch.tensor([24 * BLOCK + 3])
    assert best_blocks(scores, rows, BLOCK).nonzero()[:, 3].tolist() == [3, 5, 20]
    ratio = held(scores, mass, rows, BLOCK) / held(mass, mass, rows, BLOCK)
    assert float(ratio) == pytest.approx(0.5)


def test_rows_lie_in_the_last_half() -> None:
    rows = draw_rows(1001, 64, seed=3)
    assert len(rows.unique()) == 64 and rows.min() >= 500 and rows.max() < 1001
    assert torch.equal(rows, rows.sort().values) and not torch.equal(rows, draw_rows(1001, 64, seed=4))
    assert draw_rows(100, 64, seed=0).tolist() == [*range(50, 100)]
