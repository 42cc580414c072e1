from __future__ import annotations

import pytest

from sparseserve.questions.needles import ask, prose


@pytest.mark.parametrize("tokens", [512, 8192, 32768])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_question_has_the_length_the_depth_and_one_answer(tokens: int, depth: float) -> None:
    question = ask(tokens, depth, seed=1)
    assert question.tokens == tokens == 1 + len(question.prompt.encode())
    needle = question.prompt[question.value_start - 1 :]
    assert needle.startswith(question.answer)
    assert question.prompt.count(question.answer[:-1]) == 1
    asked_for = question.prompt[question.prompt.rindex("The pass key of") :]
    assert asked_for.endswith(" is ") and question.prompt.count(asked_for) == 2
    assert question.prompt.count("The pass key of") == 5  # needle, three distractors, question
    assert abs(question.value_start - depth * tokens) < 250


def test_questions_are_seeded() -> None:
    assert ask(1024, 0.5, seed=1) == ask(1024, 0.5, seed=1)
    assert ask(1024, 0.5, seed=1).answer != ask(1024, 0.5, seed=2).answer


def test_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="leave no room"):
        ask(100, 0.5, seed=1)


def test_prose_is_real_text_of_exact_length() -> None:
    text = prose(1_000_000, start=12345)
    assert len(text) == 1_000_000 and text.isascii()
    assert text.count(" the ") > 5000
