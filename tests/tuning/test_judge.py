"""What counts as loss, and what may be recommended."""

from __future__ import annotations

import pytest

from sparseserve.errors import TuningError
from sparseserve.evaluation.evaluation import Setting
from sparseserve.tuning.judge import Judged, choose, loss, pareto
from tests.helpers.made_up import Lab

RIGHT, HALF, WRONG = (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)


def test_loss_is_the_drop_on_questions_that_dense_attention_answers(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT, "variables": WRONG})
    policy = lab.setting("quest", {"single": HALF, "variables": RIGHT})
    found = loss(policy, dense)
    assert found.questions == 8 and found.worse == 4  # two lengths, two depths, two questions: only `single`
    assert found.score == pytest.approx(0.5)


def test_few_questions_prove_little(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT})
    found = loss(dense, dense)
    assert found.score == 0 and found.worse == 0
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 8), abs=1e-9)  # Clopper-Pearson without any event


def test_text_counts_too(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT}, bits=2.0)
    found = loss(lab.setting("quest", {"single": RIGHT}, bits=2.1), dense)
    assert found.bits == pytest.approx(0.05) and found.value == found.bits


def test_a_model_that_answers_nothing_tells_nothing(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": WRONG})
    with pytest.raises(TuningError, match="tasks that the model can answer"):
        loss(lab.setting("quest", {"single": WRONG}), dense)


def test_what_was_not_asked_is_not_judged(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT, "keys": RIGHT})
    with pytest.raises(TuningError, match="keys at 2048"):
        loss(lab.setting("quest", {"single": RIGHT}), dense)


def test_latency_takes_the_fastest_within_the_loss(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT}, ms=20, density=1.0)
    baseline = lab.judged(dense, dense)
    fast_but_wrong = lab.judged(lab.setting("streaming", {"single": HALF}, ms=4), dense)
    fast = lab.judged(lab.setting("quest", {"single": RIGHT}, ms=8), dense)
    slow = lab.judged(lab.setting("tidal", {"single": RIGHT}, ms=12), dense)
    assert choose([fast_but_wrong, fast, slow], baseline, "latency", 0.01, noise=0.05).chosen is fast
    assert choose([fast_but_wrong, fast, slow], baseline, "latency", 0.6, noise=0.05).chosen is fast_but_wrong
    nothing = choose([fast_but_wrong, fast, slow], baseline, "latency", 0.01, noise=2.0)
    assert nothing.chosen is None and "noise" in nothing.reason


def test_memory_takes_what_stores_least_then_reads_least(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT}, density=1.0)
    baseline = lab.judged(dense, dense)
    small = lab.judged(lab.setting("retrieval", {"single": RIGHT}, density=0.5), dense, stored=50.0)
    reads = lab.judged(lab.setting("quest", {"single": RIGHT}, density=0.1), dense, stored=103.0)
    assert choose([reads, small], baseline, "memory", 0.01, noise=0.0).chosen is small


def test_memory_does_not_take_what_stores_more_than_vllm(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT}, density=1.0)
    baseline = lab.judged(dense, dense)
    reads_less = lab.setting("quest", {"single": RIGHT}, density=0.1)
    verdict = choose([lab.judged(reads_less, dense, stored=103.0)], baseline, "memory", 0.01, noise=0.0)
    assert verdict.chosen is None and "stores less" in verdict.reason
    assert choose([lab.judged(reads_less, dense)], baseline, "memory", 0.01, noise=0.0).chosen is not None


def test_an_unmeasured_speed_is_not_recommended(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT}, ms=20, density=1.0)
    result = lab.setting("quest", {"single": RIGHT})
    untimed = Judged(Setting(policy="quest"), result, loss(result, dense), None, None, 0.1, 100.0, None)
    assert choose([untimed], lab.judged(dense, dense), "latency", 0.01, noise=0.0).chosen is None


def test_pareto_keeps_what_nothing_beats(lab: Lab) -> None:
    dense = lab.setting("dense", {"single": RIGHT})
    judged = [lab.judged(lab.setting("a", {"single": s}), dense) for s in (RIGHT, HALF, HALF, WRONG)]
    assert pareto(judged, [10.0, 5.0, 6.0, 5.0]) == [True, True, False, False]
