"""Tasks in the manner of RULER (arXiv 2404.06654): a long document and a question about it, with a checkable answer.

The pass keys are worded as the models that ship with the project know them, so those can answer. Everything is drawn
from a seed; documents grow by single characters, so that a prompt can be brought to an exact number of tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from sparseserve.questions.needles import asking, invented_name, pass_keys, prose, scatter, statement

INSTRUCTION = "Read the text, then answer the question that stands after it.\n\n"
ANSWER_ROOM = 32  # tokens beside those of the expected strings
DISTRACTORS, MANY, HOPS = 7, 4, 4
COMMON_WORDS, RARE_WORDS, WORD_RATIO = 3, 12, 10
PASSAGE_WORDS = 12


@dataclass(frozen=True, slots=True)
class Draft:
    """A question whose document can have any size."""

    document: Callable[[int, int], str]  # of so many characters beside what must be in it, and such a tail behind them
    question: str
    expected: tuple[str, ...]  # what a right answer holds

    def prompt(self, characters: int, tail: int = 0) -> str:
        """The whole prompt; what is asked for has its place among `characters`."""
        return INSTRUCTION + self.document(characters, tail) + "\n" + self.question

    @property
    def answer_tokens(self) -> int:
        """The most tokens that an answer may have: a token is at least a character."""
        return len(", ".join(self.expected)) + ANSWER_ROOM

    def score(self, answer: str) -> float:
        """The share of the expected strings that the answer holds, whatever their case."""
        return sum(text.lower() in answer.lower() for text in self.expected) / len(self.expected)


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question."""

    description: str
    draft: Callable[[Random, float], Draft]  # the depth counts where the answer has one place
    placed: bool  # whether it has
    exact: bool  # right or wrong, nothing between


def needle(draw: Random, depth: float) -> Draft:
    """One pass key in real text."""
    return _ask_for_key(draw, depth, distractors=0)


def multikey(draw: Random, depth: float) -> Draft:
    """One of several pass keys; the others distract."""
    return _ask_for_key(draw, depth, DISTRACTORS)


def multivalue(draw: Random, _: float) -> Draft:
    """All values of one name."""
    values = [value for _, value in pass_keys(draw, MANY)]
    name = invented_name(draw)
    pieces = _spread(draw, [statement(name, value) for value in values])
    question = f"Name all {MANY} pass keys of {name}.{asking(name)}"
    return Draft(_text(draw, pieces), question, tuple(values))


def multiquery(draw: Random, _: float) -> Draft:
    """The values of several names."""
    keys = pass_keys(draw, MANY)
    names = [name for name, _ in keys]
    pieces = _spread(draw, [statement(*key) for key in keys])
    question = f"Name the pass keys of {', '.join(names[:-1])} and {names[-1]}, in this order.{asking(names[0])}"
    return Draft(_text(draw, pieces), question, tuple(value for _, value in keys))


def variables(draw: Random, _: float) -> Draft:
    """All variables that have a value, through a chain of assignments (RULER's variable tracking)."""
    names = ["".join(draw.sample(string.ascii_uppercase, 5)) for _ in range(HOPS + 1)]
    value = str(draw.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    lines = [f"\nVAR {name} = {source}\n" for name, source in zip(names, sources, strict=False)]
    question = f"Find all variables that have the value {value}.\nThe variables with the value {value} are: "
    return Draft(_text(draw, _spread(draw, lines)), question, tuple(names))


def words(draw: Random, _: float) -> Draft:
    """The words of a list that are several times as frequent as the others (RULER's common words)."""
    vocabulary = [name.lower() for name, _ in pass_keys(draw, COMMON_WORDS + RARE_WORDS)]
    weights = [WORD_RATIO] * COMMON_WORDS + [1] * RARE_WORDS
    seed = draw.random()

    def document(characters: int, tail: int) -> str:
        size = characters + tail
        stream = Random(seed).choices(vocabulary, weights, k=1 + size // 5)  # a word and its space: 6 or more
        return " ".join(stream)[:size]

    question = f"Name the {COMMON_WORDS} most frequent words of the list.\nThe most frequent words are: "
    return Draft(document, question, tuple(vocabulary[:COMMON_WORDS]))


def copy(draw: Random, depth: float) -> Draft:
    """A passage of invented words, word for word."""
    name = invented_name(draw)
    passage = [name.lower() for name, _ in pass_keys(draw, PASSAGE_WORDS)]
    piece = f" The passage of {name} is {' '.join(passage)}. "
    question = f"Repeat the passage of {name}.\nThe passage of {name} is "
    return Draft(_text(draw, [(depth, piece)]), question, tuple(passage))


def facts(draw: Random, depth: float) -> Draft:
    """One fact among nothing but facts of its kind."""
    (name, _), (town, _) = pass_keys(draw, 2)
    seed = draw.random()

    def document(characters: int, tail: int) -> str:
        others, text = Random(seed), ""
        while len(text) < characters + tail:
            text += _fact(invented_name(others), invented_name(others))
        return scatter(text[:characters], [(depth, "\n" + _fact(name, town))]) + text[characters : characters + tail]

    return Draft(document, f"Where does {name} live?\nThe home of {name} is ", (town,))


TASKS: dict[str, Task] = {
    "needle": Task("one pass key in real text", needle, placed=True, exact=True),
    "multikey": Task(f"one pass key among {DISTRACTORS} others", multikey, placed=True, exact=True),
    "multivalue": Task(f"all {MANY} pass keys of one name", multivalue, placed=False, exact=False),
    "multiquery": Task(f"the pass keys of {MANY} names", multiquery, placed=False, exact=False),
    "variables": Task(f"all variables of a chain of {HOPS} assignments", variables, placed=False, exact=False),
    "words": Task(f"the {COMMON_WORDS} most frequent words of a list", words, placed=False, exact=False),
    "copy": Task(f"a passage of {PASSAGE_WORDS} invented words, repeated", copy, placed=True, exact=False),
    "facts": Task("one fact among many of its kind", facts, placed=True, exact=True),
}


def draft(task: str, length: int, depth: float | None, sample: int, seed: int) -> Draft:
    """The question number `sample` of a cell; the same for every setting, and whatever else is asked."""
    return TASKS[task].draft(Random(f"{task} {length} {depth} {sample} {seed}"), depth or 0)


def _ask_for_key(draw: Random, depth: float, distractors: int) -> Draft:
    (name, value), *others = pass_keys(draw, 1 + distractors)
    pieces = [(depth, statement(name, value)), *((draw.random(), statement(*key)) for key in others)]
    return Draft(_text(draw, pieces), asking(name).lstrip(), (value,))


def _text(draw: Random, pieces: Sequence[tuple[float, str]]) -> Callable[[int, int], str]:
    """Real text from a drawn place on, with the pieces in it."""
    start = draw.randrange(1 << 30)
    return lambda characters, tail: scatter(prose(characters, start), pieces) + prose(tail, start + characters)


def _spread(draw: Random, pieces: Sequence[str]) -> list[tuple[float, str]]:
    """The pieces in order, at drawn places."""
    return list(zip(sorted(draw.random() for _ in pieces), pieces, strict=True))


def _fact(name: str, town: str) -> str:
    return f"The home of {name} is {town}.\n"
