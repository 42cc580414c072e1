"""Two tensor-parallel ranks on the CPU give the tokens of one, and each measures its own heads."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from sparseserve.config import to_dict
from sparseserve.demo import circuits
from sparseserve.policies import Policy, Quest, Retrieval
from sparseserve.questions.needles import ask
from sparseserve.testing.plans import write_head_map
from tests.helpers.plugin import one_process

pytestmark = pytest.mark.vllm
SCRIPT = "tests.helpers.plugin.ranks"
QUESTIONS = [ask(2048, depth, seed) for depth, seed in ((0.1, 1), (0.5, 2), (0.8, 3))]
Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    heads = write_head_map(tmp_path_factory.mktemp("heads") / "heads.json", set(circuits.retrieval_heads()))
    window: dict[str, Any] = {"sink_tokens": 64, "recent_tokens": 192, "kv_memory": "shared"}
    return {
        "quest": Quest(budget_tokens=512, min_tokens=256, recall_sample=1),
        "retrieval": Retrieval(artifact=heads, min_tokens=256, recall_sample=1, **window),
    }


def answers(model: Path, policies: dict[str, Policy], ranks: int) -> Answers:
    engine = {"max_model_len": 4096, "max_num_seqs": 4, "tensor_parallel_size": ranks}
    asked = {name: to_dict(policy) for name, policy in policies.items()}
    prompts = [question.prompt for question in QUESTIONS]
    found, _ = one_process.ask(SCRIPT, model, policies["quest"], engine, policies=asked, prompts=prompts)
    assert isinstance(found, dict)
    return found


def test_two_ranks_answer_as_one_and_measure_their_heads(model: Path, policies: dict[str, Policy]) -> None:
    one, two = (answers(model, policies, ranks) for ranks in (1, 2))
    for name, alone in one.items():
        assert two[name]["tokens"] == alone["tokens"]
        assert alone["texts"] == [question.answer for question in QUESTIONS]
        for (whole,), parts in zip(alone["outcomes"], two[name]["outcomes"], strict=True):
            assert [part["policy"] for part in parts] == [name, name]
            # The worst layer of both halves together is no worse than what each lost in its own worst one.
            assert mean(part["recall"] for part in parts) < whole["recall"] + 0.02 < 1
