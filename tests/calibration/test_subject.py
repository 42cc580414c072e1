"""The models that calibration loads: their attention is transformers' own, seen a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparseserve.calibration.attention import Attention, hooked
from sparseserve.calibration.samples import answer, document, needle, repeats
from sparseserve.calibration.subject import Subject, decode, load
from sparseserve.errors import CalibrationError, UnsupportedError

RandomModel = Callable[..., Path]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma")
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_the_models_own(family: str, random_model: RandomModel) -> None:
    path = random_model(family)
    subject, ids = load(str(path)), list(range(1, 150))
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    seen: list[Tensor] = []

    def look(attention: Attention) -> None:
        seen.append(
            torch.cat([torch.nn.functional.pad(w, (0, 149 - w.shape[2])) for _, w in attention.block_rows()], 1)
        )

    with torch.no_grad(), hooked(look):
        logits = subject.model(subject.tensor(ids)).logits
        expected = eager(subject.tensor(ids), output_attentions=True)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    for weights, own in zip(seen, expected.attentions, strict=True):
        torch.testing.assert_close(weights, own[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 130])
def test_output_and_masked_output(queries: int) -> None:
    torch.manual_seed(0)
    attention = Attention(0, torch.randn(4, queries, 16), torch.randn(2, 130, 16), torch.randn(2, 130, 16), 0.3)
    rows = torch.cat([torch.nn.functional.pad(w, (0, 130 - w.shape[2])) for _, w in attention.block_rows()], 1)
    expected = rows @ attention.value.repeat_interleave(2, 0)
    torch.testing.assert_close(attention.output(), expected, rtol=1e-4, atol=1e-5)
    everything = attention.masked_output(lambda first, last: torch.ones(1, last - first, last, dtype=torch.bool))
    torch.testing.assert_close(everything, expected, rtol=1e-4, atol=1e-5)
    itself = attention.masked_output(
        lambda first, last: (torch.arange(last) == torch.arange(first, last)[:, None])[None]
    )
    torch.testing.assert_close(itself, attention.value.repeat_interleave(2, 0)[:, attention.start :])


def test_decode_is_generate(demo: Subject) -> None:
    question = needle(demo, 700, 0.4, seed=3)
    out = demo.model.generate(demo.tensor(question.ids), max_new_tokens=24, do_sample=False)[0, 700:].tolist()
    answer = decode(demo, question.ids, 24)
    assert [*answer, 257] == out
    assert demo.tokenizer.decode(answer) == question.answer + "."


@pytest.mark.parametrize("tokens", [600, 2048])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_has_its_length_depth_and_value(trained: Subject, tokens: int, depth: float) -> None:
    question = needle(trained, tokens, depth, seed=1)
    assert len(question.ids) == tokens
    assert trained.tokenizer.decode([question.ids[i] for i in question.value]) == question.answer
    assert bytes(i for i in question.ids if i < 256).count(question.answer.encode()) == 1
    assert abs(question.value.start - depth * tokens) < 250
    assert question == needle(trained, tokens, depth, seed=1) != needle(trained, tokens, depth, seed=2)


def test_a_document_is_text_of_its_length(demo: Subject, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("abc")
    assert len(document(demo, 5000, seed=0)) == 5000
    assert set(document(demo, 100, seed=0, file=tmp_path / "own.txt")[1:]) == set(b"abc")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("gemma2", {"sliding_window": 64}, "full attention"),
        ("deepseek_v3", MLA, "full"),
    ],
)
def test_other_attention_is_refused(
    family: str, changes: dict[str, object], said: str, random_model: RandomModel
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        load(str(random_model(family, **changes)))


@pytest.mark.parametrize(("content", "said"), [({}, "causal language model"), ({"config.json": "{"}, "causal")])
def test_what_is_no_model_is_refused(content: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=said):
        load(str(tmp_path))


def test_an_answer_ends_with_its_value(trained: Subject) -> None:
    question = needle(trained, 1024, 0.4, seed=1)
    widths: list[int] = []
    tokens, right = answer(trained, question, lambda attention: widths.append(attention.query.shape[1]), rows=5)
    assert right and trained.tokenizer.decode(tokens).endswith(question.answer)
    assert widths == [5] * 4 + [1] * 4 * (len(tokens) - 1)  # 4 layers
    wrong = replace(question, answer="not this")
    assert not answer(trained, wrong)[1]


def test_repeats_are_random_tokens_of_the_text(demo: Subject) -> None:
    ids = repeats(demo, 2048, times=4, seed=0)
    begin, blocks = ids[0], [ids[1 + 511 * i : 1 + 511 * (i + 1)] for i in range(4)]
    assert begin == 256 and len(ids) == 2045 and all(block == blocks[0] for block in blocks)
    assert {*blocks[0]} < {*range(128)} and len({*blocks[0]}) > 80
    assert len({*repeats(demo, 200, times=4, seed=0)[1:50]}) == 49
    assert ids != repeats(demo, 2048, times=4, seed=1)
