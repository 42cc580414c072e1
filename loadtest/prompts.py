"""Prompts of a scenario: seeded, out of real text, with pass keys whose answers are known."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path

from loadtest.scenario import Agents, Documents, LoadTestError, Reasoning, Scenario, Turns

CAPITALS = string.ascii_uppercase + string.digits


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent, and what the answer must hold."""

    text: str
    answer: str | None  # None where none is known


@dataclass(frozen=True, slots=True)
class Tokens:
    """What prompts must know of a tokenizer."""

    characters: float  # of a token of the source text, on average
    spaces: bool  # whether a space before a word is a token of its own


def prompts(scenario: Scenario, run: str, tokens: Tokens, requests: int | None = None) -> list[Prompt]:
    """The prompts of a run, in the order in which they are sent. `run` makes those of another run different ones, so
    that no run finds the prompts of another in the prefix cache.

    Where the first token of an answer begins with a space, the question does not end with one.
    """
    writer = Writer(f"{scenario.seed} {run}", source(scenario.text), tokens.characters)
    shape = scenario.prompts
    drawn: Iterator[Prompt]
    match shape:
        case Documents():
            drawn = (document(writer, length) for length in cycle(shape.lengths))
        case Turns():
            drawn = turns(writer, shape)
        case Agents():
            drawn = agents(writer, shape)
        case Reasoning():
            drawn = (Prompt(writer.prose(writer.room(shape.length)), None) for _ in count())
    made = list(islice(drawn, requests or scenario.requests))
    known = scenario.answers == "needle"
    return [Prompt(one.text if tokens.spaces else one.text.rstrip(" "), one.answer if known else None) for one in made]


def write_dataset(made: list[Prompt], output_tokens: int, path: Path) -> None:
    """The `custom` dataset of `vllm bench serve`, and the answers, which it does not look at."""
    lines = (json.dumps({"prompt": one.text, "output_tokens": output_tokens, "answer": one.answer}) for one in made)
    path.write_text("".join(f"{line}\n" for line in lines))


@cache
def source(text: Path | None) -> str:
    """The text that documents are cut from; LoadTestError for a file that cannot be read."""
    if text is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values()).encode("ascii", "ignore").decode()
    try:
        return text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"text = {text} cannot be read: {error}. Expected: a text file in UTF-8.") from None


class Writer:
    """Draws text and pass keys."""

    def __init__(self, seed: str, source: str, characters_per_token: float) -> None:
        self._draw = random.Random(seed)
        self._source = source
        self._size = characters_per_token
        self._names: set[str] = set()

    def room(self, tokens: int) -> int:
        """Characters of so many tokens."""
        return round(tokens * self._size)

    def prose(self, characters: int) -> str:
        """Real text from a drawn place, cyclic."""
        start = self._draw.randrange(len(self._source))
        repeats = 1 + (start + characters) // len(self._source)
        return (self._source * repeats)[start : start + max(0, characters)]

    def key(self) -> tuple[str, str]:
        """A name that was not drawn before, and its value."""
        while (name := self._name()) in self._names:
            pass
        self._names.add(name)
        return name, "".join(self._draw.choices(CAPITALS, k=8))

    def pick(self, keys: list[tuple[str, str]]) -> tuple[str, str]:
        """One of the keys."""
        return self._draw.choice(keys)

    def with_needles(self, characters: int, keys: list[tuple[str, str]]) -> str:
        """Text of so many characters that states the keys at drawn places."""
        needles = [needle(*key) for key in keys]
        text = self.prose(characters - sum(map(len, needles)))
        document, end = "", 0
        for place, piece in zip(sorted(self._draw.randint(0, len(text)) for _ in needles), needles, strict=True):
            document, end = document + text[end:place] + piece, place
        return document + text[end:]

    def _name(self) -> str:
        size = self._draw.randint(5, 8)
        return "".join(self._draw.choice("aeiou" if i % 2 else "bcdfghjklmnprstvz") for i in range(size)).capitalize()


def needle(name: str, value: str) -> str:
    """States a pass key."""
    return f" The pass key of {name} is {value}. "


def question(name: str) -> str:
    """Asks for it."""
    return f"\nThe pass key of {name} is "


def document(writer: Writer, length: int) -> Prompt:
    """A document with four pass keys, one of which is asked."""
    keys = [writer.key() for _ in range(4)]
    name, value = writer.pick(keys)
    asked = question(name)
    return Prompt(writer.with_needles(writer.room(length) - len(asked), keys) + asked, value)


def turns(writer: Writer, shape: Turns) -> Iterator[Prompt]:
    """Turn by turn, all conversations in each; a turn asks what none of its conversation asked before."""
    keys = [writer.key() for _ in range(32)]
    shared = writer.with_needles(writer.room(shape.document), keys)
    histories = [shared] * shape.conversations
    for turn in count():
        for speaker in range(shape.conversations):
            name, value = keys[(turn + 5 * speaker) % len(keys)]
            histories[speaker] += question(name)
            yield Prompt(histories[speaker], value)
            histories[speaker] += f"{value}."


def agents(writer: Writer, shape: Agents) -> Iterator[Prompt]:
    """Step by step, all agents in each; a step asks for something that any step before may have brought."""
    contexts: list[tuple[str, list[tuple[str, str]]]] = []
    for _ in range(shape.agents):
        keys = [writer.key() for _ in range(2)]
        contexts.append((writer.with_needles(writer.room(shape.start), keys), keys))
    while True:
        for number, (context, keys) in enumerate(contexts):
            name, value = writer.pick(keys)
            yield Prompt(context + question(name), value)
            key = writer.key()
            brought = f"{question(name)}{value}.\n{writer.with_needles(writer.room(shape.step), [key])}"
            contexts[number] = context + brought, [*keys, key]
