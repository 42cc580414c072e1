"""The gates of the built demo model find the needle in 8k tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseserve import reference
from sparseserve.demo.circuits import GROUP, HEAD_DIM, KV_HEADS, LAYERS, ROPE_THETA
from sparseserve.demo.gates import build_gates
from sparseserve.model import ModelShape
from sparseserve.policies import Seer
from sparseserve.questions.needles import Question, ask
from sparseserve.testing.gates import plain_rope
from sparseserve.types import HeadShape, PageTable, Selection, Wanted
from tests.helpers.demo_simulator import Policy, Simulator, encode

LENGTH, BLOCK = 8192, 64
MODEL = ModelShape(
    name="demo",
    layers=LAYERS,
    heads=HeadShape(KV_HEADS, GROUP, HEAD_DIM),
    max_len=LENGTH + 64,
    page_size=BLOCK,
    rope=partial(plain_rope, LENGTH + 64, theta=ROPE_THETA),
)


def seer(path: Path, budget: int) -> Policy:
    """The policy by its reference, on contiguous keys."""
    seer = Seer(artifact=str(path), budget_tokens=budget)
    plans = seer.plans(MODEL)

    def policy(layer: int, query: Tensor, key: Tensor) -> Tensor:
        plan, length = plans[layer], key.shape[1]
        assert plan.gate is not None and plan.sink is not None and plan.recent is not None and plan.budget is not None
        paged = pad(key, (0, 0, 0, -length % BLOCK)).unflatten(1, (-1, BLOCK)).transpose(0, 1)  # [N, H, BLOCK, D]
        token = torch.arange(length)
        summary = torch.zeros(len(paged), KV_HEADS, 1, HEAD_DIM)
        reference.summarize_gates(paged, token, token, plan.gate, summary)
        table = PageTable(torch.arange(len(paged))[None].int(), torch.tensor([length], dtype=torch.int32))
        scores = reference.score_gates(query.flatten(0, 1)[None], summary, table, BLOCK, plan.gate)
        selection = Selection.empty(1, KV_HEADS, seer.selection_units(MODEL.max_len), BLOCK)
        reference.select_units(scores, table.seq_lens, Wanted(selection, plan.sink, plan.recent, plan.budget))
        return reference.attended_tokens(selection, 0, length)

    return policy


@pytest.fixture(scope="module")
def asked() -> tuple[Simulator, Question]:
    question = ask(LENGTH, depth=0.1, seed=1)
    simulator = Simulator(torch.bfloat16)
    simulator.prefill(encode(question.prompt))
    return simulator, question


def test_gates_find_the_needle(asked: tuple[Simulator, Question], tmp_path: Path) -> None:
    simulator, question = asked
    build_gates(tmp_path / "gates.safetensors")
    assert simulator.decode(seer(tmp_path / "gates.safetensors", 1024)) == question.answer


def test_a_budget_of_two_blocks_loses_it(asked: tuple[Simulator, Question], tmp_path: Path) -> None:
    simulator, question = asked
    build_gates(tmp_path / "gates.safetensors")
    assert simulator.decode(seer(tmp_path / "gates.safetensors", 2 * BLOCK)) != question.answer


def test_the_file_is_always_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_gates(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
