"""The small trained model that ships with the package."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch

from sparseserve.questions.needles import ask

transformers = pytest.importorskip("transformers")


def test_answers_through_the_chat_template() -> None:
    folder = str(files("sparseserve.demo") / "trained")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = ask(1024, 0.4, seed=1)
    chat = [{"role": "user", "content": question.prompt}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=len(question.answer), do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(tokens) == question.answer
