"""The built model folder: what is in it, and that transformers serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseserve.demo import circuits
from sparseserve.demo.build import build
from sparseserve.questions.needles import ask
from tests.helpers.demo_simulator import Simulator, encode

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    build(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_weights_are_deterministic_and_fit_bfloat16(folder: Path, tmp_path: Path) -> None:
    build(tmp_path)
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all()
        assert torch.equal(tensor, second[name])


def test_residual_stream_is_covered_once() -> None:
    parts = [getattr(circuits, n) for n in ("CONST", "BOS", "CLASS", "BYTE", "HERE", "BEFORE", "COPIED", "RECENT")]
    assert [p.stop for p in parts[:-1]] == [p.start for p in parts[1:]]
    assert parts[0].start == 0 and parts[-1].stop == circuits.HIDDEN


def test_ground_truth_file(folder: Path) -> None:
    truth = json.loads((folder / "retrieval_heads.json").read_text())
    heads = [(head["layer"], head["kv_head"]) for head in truth["retrieval_heads"]]
    assert heads == circuits.retrieval_heads() == [(3, 0), (3, 2), (5, 1), (5, 3)]
    assert truth["reselect_layer"] == 4
    assert all(truth["roles"][layer][head] == "retrieval" for layer, head in heads)


def test_tokenizer_is_bytes_and_chat_passes_text_through(tokenizer: Any) -> None:
    text = "Ünïcode 7 \n\t. 'x' is "
    assert tokenizer(text).input_ids == encode(text)
    assert tokenizer.decode(encode(text)[1:]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<s>" + text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_answers_and_stops(folder: Path, tokenizer: Any, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    question = ask(1024, 0.3, seed=1)
    ids = torch.tensor([tokenizer(question.prompt).input_ids])
    tokens = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(tokens) == question.answer + "</s>"


def test_simulator_computes_what_transformers_computes(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = encode(ask(600, 0.5, seed=2).prompt)
    simulator = Simulator()
    simulator.prefill(ids, chunk=256)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(simulator.logits, logits, rtol=1e-4, atol=1e-3)
