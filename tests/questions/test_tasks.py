"""Questions: seeded, of exact length, with their answers in the document; scores and intervals."""

from __future__ import annotations

from typing import Any

import pytest

from sparseserve.errors import ConfigError
from sparseserve.evaluation.intervals import interval
from sparseserve.questions.tasks import TASKS, Draft, draft
from tests.helpers.evaluation import FakeClient

LENGTH = 3000


@pytest.mark.parametrize("task", TASKS)
def test_a_question_is_seeded_and_answerable_at_any_size(task: str) -> None:
    question, again = (draft(task, LENGTH, 0.5, 0, seed=1) for _ in range(2))
    for characters in (500, 3000):
        prompt = question.prompt(characters)
        assert prompt == again.prompt(characters)
        assert len(prompt) == characters + len(question.prompt(0))
        assert all(text in prompt for text in question.expected)
    others = [draft(task, LENGTH, 0.5, 1, seed=1), draft(task, LENGTH, 0.5, 0, seed=2)]
    assert question.expected not in [other.expected for other in others]
    assert question.score(f"Well: {', '.join(question.expected).upper()}.") == 1
    assert question.score("no idea") == 0
    assert question.score(question.expected[0]) == 1 / len(question.expected)
    assert question.answer_tokens >= len(", ".join(question.expected))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.placed])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_the_answer_stands_at_its_depth(task: str, depth: float) -> None:
    question = draft(task, LENGTH, depth, 0, seed=1)
    prompt = question.prompt(8000)
    assert prompt.count(question.expected[0]) == 1
    assert abs(prompt.index(question.expected[0]) / len(prompt) - depth) < 0.1


def test_distractors_and_chains() -> None:
    assert draft("multikey", LENGTH, 0.5, 0, 0).prompt(2000).count("The pass key of") == 9  # one of them asks
    chain = draft("variables", LENGTH, None, 0, 0)
    prompt, sources = chain.prompt(2000), [f"VAR {name}" for name in chain.expected[:-1]]
    places = [prompt.index(f"VAR {name} = {source}") for name, source in zip(chain.expected[1:], sources, strict=True)]
    assert places == sorted(places)


def test_the_frequent_words_are_the_frequent_ones() -> None:
    question = draft("words", LENGTH, None, 0, 0)
    listed = question.document(2000, 0).split()
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert {word for _, word in counts[:3]} == set(question.expected)
    assert counts[2][0] > 2 * counts[3][0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["bytes", "words"])
def test_prompts_have_the_exact_number_of_tokens_after_few_tries(task: str, split: str) -> None:
    client = FakeClient(split)
    for sample in range(3):
        question = draft(task, LENGTH, 0.3, sample, seed=5)
        prompt = client.fit(question, LENGTH)
        assert client.count(prompt) == LENGTH
        assert all(text in prompt for text in question.expected)
    assert client.counted <= (10 if split == "bytes" else 30)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_does_not_depend_on_those_before(task: str) -> None:
    """A resumed run starts in the middle."""
    before, question = (draft(task, LENGTH, 0.3, sample, seed=5) for sample in range(2))
    client = FakeClient("words")
    client.fit(before, LENGTH)
    assert client.fit(question, LENGTH) == FakeClient("words").fit(question, LENGTH)


def test_a_length_without_room_is_refused() -> None:
    question = draft("multikey", 100, 0.3, 0, 0)
    with pytest.raises(ConfigError, match=r"--lengths = 100 .* at least \d+ tokens"):
        FakeClient("bytes").fit(question, 100)


@pytest.mark.parametrize(
    ("scores", "exact", "expected"),
    [
        ([1] * 10, True, (0.7225, 1)),  # Wilson (1927) at 95 %
        ([1] * 8 + [0] * 2, True, (0.4902, 0.9433)),
        ([0] * 5, True, (0, 0.4345)),
        ([0.5], False, (0, 1)),
        ([0.25] * 6, False, (0.0301, 0.7)),  # Wilson's of 1 and of 2 in 6
        ([1.0] * 10, False, (0.7225, 1)),
    ],
)
def test_intervals(scores: list[float], exact: bool, expected: Any) -> None:
    assert interval(scores, exact, seed=0) == pytest.approx(expected, abs=1e-4)


def test_the_bootstrap_is_seeded_and_holds_the_mean() -> None:
    scores = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75, 0.25, 0.5]
    low, high = interval(scores, False, seed=3)
    assert (low, high) == interval(scores, False, seed=3)
    assert 0.25 < low < sum(scores) / len(scores) < high < 0.9


def test_scores_are_of_the_strings_found() -> None:
    question = Draft(lambda characters, tail: "", "?", ("AB12", "CD34"))
    assert [question.score(answer) for answer in ("ab12 and cd34", "AB12", "AB1 CD3")] == [1, 0.5, 0]
