"""Needle questions over real text: one pass key to find among distractors, seeded and of exact length."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

_VALUE = string.ascii_uppercase + string.digits


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its only right answer; one byte is one token, and the tokenizer adds `<s>`."""

    prompt: str
    answer: str  # with the final full stop
    value_start: int  # token index of the first byte of the value in the document, counting <s>

    @property
    def tokens(self) -> int:
        """Length of the prompt with `<s>`."""
        return 1 + len(self.prompt)


@cache
def library_text() -> str:
    """Real English: the language reference that ships with CPython, ASCII alone."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values()).encode("ascii", "ignore").decode()


def prose(tokens: int, start: int = 0) -> str:
    """That many bytes of `library_text`, from byte `start` on, cyclic."""
    text = library_text()
    start %= len(text)
    repeats = 1 + (start + tokens) // len(text)
    return (text * repeats)[start : start + tokens]


def ask(tokens: int, depth: float, seed: int, distractors: int = 3, value_length: int = 8) -> Question:
    """A question of `tokens` tokens whose needle starts at `depth` (0 to 1) of the document."""
    draw = random.Random(f"{tokens} {depth} {seed} {distractors}")
    (name, value), *others = keys = pass_keys(draw, 1 + distractors, value_length)
    needles = [statement(*key) for key in keys]
    question = asking(name)

    room = tokens - 1 - len(question) - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"{tokens} tokens leave no room for {len(needles)} needles and the question")
    text = prose(room, draw.randrange(len(library_text())))
    places = [depth, *(draw.random() for _ in others)]
    prompt = scatter(text, zip(places, needles, strict=True)) + question
    return Question(prompt, value + ".", 1 + prompt.index(needles[0]) + needles[0].index(value))


def scatter(text: str, pieces: Iterable[tuple[float, str]]) -> str:
    """The text with pieces put in, each where that part of it (0 to 1) ends."""
    document, end = "", 0
    for place, piece in sorted(pieces):
        start, end = end, round(place * len(text))
        document += text[start:end] + piece
    return document + text[end:]


def pass_keys(draw: random.Random, count: int, value_length: int = 8) -> list[tuple[str, str]]:
    """So many names, all different, each with a value of capitals and digits."""
    keys: dict[str, str] = {}
    while len(keys) < count:
        keys[invented_name(draw)] = "".join(draw.choices(_VALUE, k=value_length))
    return list(keys.items())


def statement(name: str, value: str) -> str:
    """The needle."""
    return f" The pass key of {name} is {value}. "


def asking(name: str) -> str:
    """The question, which the value answers."""
    return f"\nThe pass key of {name} is "


def invented_name(draw: random.Random) -> str:
    """Five to eight letters that can be spoken, the first a capital."""
    letters = [draw.choice("aeiou" if i % 2 else "bcdfghjklmnprstvz") for i in range(draw.randint(5, 8))]
    return "".join(letters).capitalize()
