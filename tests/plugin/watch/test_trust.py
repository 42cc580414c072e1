"""Quality that is lost is seen, and rescued where the server was told to; a real engine under vLLM's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparseserve.config import to_dict
from sparseserve.demo import circuits
from sparseserve.policies import Quest
from sparseserve.questions.needles import Question, ask
from tests.helpers.plugin import one_process

pytestmark = pytest.mark.vllm
SCRIPT = "tests.helpers.plugin.trusting"
QUESTIONS = [ask(2200, depth, seed) for seed, depth in enumerate((0.15, 0.4, 0.6))]
BUDGET, PAGE = 128, 128
# All rows but one fit with what they generate: one waits, preempted, for another to end.
BLOCKS = 1 + 3 * 18 + 2


def tiny(**guard: Any) -> dict[str, Any]:
    """A budget that the needles do not fit in."""
    return to_dict(Quest(budget_tokens=BUDGET, min_tokens=256, max_budget_tokens=1024, dense_layers=1, **guard))


def case(name: str, policy: dict[str, Any], questions: list[Question] = QUESTIONS, **options: Any) -> dict[str, Any]:
    prompts = [question.prompt for question in questions]
    return {"name": name, "policy": policy, "prompts": prompts, "tokens": 12, **options}


CASES = [
    case("unguarded", tiny()),
    case("reported", tiny(recall_sample=1, recall_floor=0.9), record=True),
    case("widened", tiny(recall_sample=1, recall_floor=0.9, recall_action="widen")),
    case("dense", tiny(recall_sample=1, recall_floor=0.9, recall_action="dense")),
    case("preempted", tiny(recall_sample=1, recall_floor=0.9, recall_action="dense"), tokens=300, long=True),
]


@pytest.fixture(scope="module")
def answers(model: Path) -> dict[str, Any]:
    engine = {"max_model_len": 4096, "block_size": PAGE, "num_gpu_blocks_override": BLOCKS, "disable_log_stats": False}
    found, _ = one_process.ask(SCRIPT, model, Quest(min_tokens=256), engine, cases=CASES, layers=circuits.LAYERS)
    assert isinstance(found, dict)
    return found


def right(answer: dict[str, Any]) -> int:
    return sum(text == question.answer for text, question in zip(answer["texts"], QUESTIONS, strict=True))


def test_recall_is_that_of_an_offline_oracle_on_recorded_traffic(answers: dict[str, Any]) -> None:
    reported, oracle = answers["reported"]["reported"], answers["reported"]["oracle"]
    assert len(reported) == len(oracle) == circuits.LAYERS
    assert reported == pytest.approx(oracle, abs=0.01) and min(oracle) < 0.9


def test_what_is_only_reported_stays_wrong_and_is_counted(answers: dict[str, Any]) -> None:
    assert answers["reported"]["texts"] == answers["unguarded"]["texts"] and right(answers["reported"]) < 3
    counts = answers["reported"]["counts"]
    assert counts["sparseserve_under_floor_total,action=report"] == 3
    assert not any(value for name, value in counts.items() if "widened_total" in name or "fallback_total" in name)
    assert all(outcome["recall"] < 0.9 and not outcome["dense"] for outcome in answers["reported"]["outcomes"])
    assert "sparseserve_attention_recall_count,layers=2-3" not in answers["unguarded"]["counts"]


@pytest.mark.parametrize("action", ["widened", "dense"])
def test_the_guard_rescues_every_answer_and_says_so(action: str, answers: dict[str, Any]) -> None:
    answer = answers[action]
    assert right(answer) == 3
    counts, outcomes = answer["counts"], answer["outcomes"]
    if action == "dense":
        assert counts["sparseserve_dense_fallback_total,reason=recall"] == 3
        assert all(outcome["dense"] and outcome["reason"] == "recall" for outcome in outcomes)
        assert counts["sparseserve_dense_rows_total,reason=guard"] > 3
    else:
        assert counts["sparseserve_budget_widened_total"] == sum(outcome["widened"] for outcome in outcomes) >= 3
        assert all(outcome["budget_tokens"] > BUDGET for outcome in outcomes)


def test_what_the_guard_made_of_a_request_outlives_its_preemption(answers: dict[str, Any]) -> None:
    counts = answers["preempted"]["counts"]
    assert counts["preemptions"] > 0
    assert counts["sparseserve_dense_fallback_total,reason=recall"] == 3  # once each, not again on return
    assert [text[:9] for text in answers["preempted"]["texts"]] == [question.answer for question in QUESTIONS]
    assert all(outcome["dense"] for outcome in answers["preempted"]["outcomes"])
