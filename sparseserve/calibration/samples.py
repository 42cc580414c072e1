"""Prompts to measure on: needles in text, and plain text, of an exact number of tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path

from sparseserve.calibration.attention import Hook
from sparseserve.calibration.subject import Subject, decode
from sparseserve.errors import CalibrationError, Problem
from sparseserve.questions.needles import asking, library_text, pass_keys, statement

MARK = "sparseserve-content"  # stands for the message when a chat template is taken apart
PREAMBLE_TOKENS = 32  # that a model may say before it comes to the value


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt that asks for a value which stands once in it."""

    ids: list[int]
    value: range  # positions of the value's tokens in `ids`
    answer: str  # the value


def needle(
    subject: Subject, tokens: int, depth: float, seed: int, distractors: int = 3, file: Path | None = None
) -> Needle:
    """A needle question of exactly `tokens` tokens, chat template included, with distractors in seeded text.

    The sentences are those of `demo.questions`, put between the text as tokens, so that the length is exact.
    """
    draw = random.Random(f"{tokens} {depth} {seed} {distractors}")
    keys = pass_keys(draw, 1 + distractors)
    name, value = keys[0]
    sentences = [_ids(subject, statement(*key)) for key in keys]
    question = _question(subject, name, value)
    before, after = _template(subject)
    room = tokens - len(before) - sum(map(len, sentences)) - len(question) - len(after)
    if room < 0:
        allowed = f"at least {tokens - room}, for {len(keys)} needles and the question"
        raise CalibrationError(Problem("length", tokens, allowed, remedy="give a larger length"))
    hay = stretch(subject, room, draw.randrange(1 << 30), file)
    places = [round(depth * room), *(draw.randrange(room + 1) for _ in keys[1:])]
    ids, end, start = list(before), 0, 0
    for place, index in sorted((place, index) for index, place in enumerate(places)):
        ids += hay[end:place]
        start, end = len(ids) if index == 0 else start, place
        ids += sentences[index]
    found = _value_tokens(subject, statement(name, value), value)
    return Needle([*ids, *hay[end:], *question, *after], range(start + found.start, start + found.stop), value)


def answer(subject: Subject, question: Needle, hook: Hook | None = None, rows: int = 1) -> tuple[list[int], bool]:
    """The greedy answer, up to the value, and whether it holds the value; `hook` and `rows` as `decode` has them."""
    most = 2 * len(question.value) + PREAMBLE_TOKENS
    tokens = decode(subject, question.ids, most, hook, rows=rows, until=question.answer)
    return tokens, question.answer in subject.tokenizer.decode(tokens)


def document(
    subject: Subject, tokens: int, seed: int, file: Path | None = None, part: tuple[float, float] = (0, 1)
) -> list[int]:
    """`tokens` tokens that begin as every prompt of the tokenizer does and go on with seeded text, see `stretch`."""
    begin = subject.tokenizer("").input_ids
    return [*begin, *stretch(subject, tokens - len(begin), seed, file, part)]


def repeats(subject: Subject, tokens: int, times: int, seed: int, file: Path | None = None) -> list[int]:
    """Random tokens `times` times over, at most `tokens` in all, behind what begins every prompt of the tokenizer.

    They are drawn from those that the text has, without repetition while there are enough: tokens that no text has
    (special ones, bytes of other encodings) are ones that a model may never have seen.
    """
    begin, draw = subject.tokenizer("").input_ids, random.Random(seed)
    known = sorted({*_library(subject.tokenizer, file)} - {*subject.tokenizer.all_special_ids})
    size = (tokens - len(begin)) // times
    block = draw.sample(known, size) if size <= len(known) else draw.choices(known, k=size)
    return [*begin, *block * times]


def stretch(
    subject: Subject, tokens: int, seed: int, file: Path | None = None, part: tuple[float, float] = (0, 1)
) -> list[int]:
    """`tokens` consecutive tokens, from a seeded place on, of a file or of the text that ships with CPython; cyclic.

    All of them lie in `part` of it, from which share to which: what is held out has another one, and must be there.
    """
    ids = _library(subject.tokenizer, file)
    if part != (0, 1):
        ids = _held_apart(ids, tokens, file, part)
    start = random.Random(seed).randrange(len(ids))
    return [*ids[start : start + tokens], *(ids * -(-max(0, start + tokens - len(ids)) // len(ids)))][:tokens]


def _held_apart(ids: list[int], tokens: int, file: Path | None, part: tuple[float, float]) -> list[int]:
    mine = ids[int(part[0] * len(ids)) : int(part[1] * len(ids))]
    if len(mine) < tokens:
        allowed = (
            f"a text of at least {ceil(tokens / (part[1] - part[0]))} tokens (it has {len(ids)}): some is held out"
        )
        raise CalibrationError(Problem("--text", file, allowed, remedy="give a longer text or smaller --lengths"))
    return mine


def text_sha256(file: Path | None) -> str:
    """Tells texts apart, also those of one path."""
    return hashlib.sha256(text_of(file).encode()).hexdigest()


@lru_cache(maxsize=2)
def _library(tokenizer: object, file: Path | None) -> list[int]:
    return _tokenize(tokenizer, text_of(file))


def text_of(file: Path | None) -> str:
    """That of a file, or the language reference that ships with CPython with every paragraph once."""
    try:
        text = file.read_text() if file else _unrepeated(library_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(Problem("--text", file, "a text file", remedy=f"check the path ({error})")) from None
    if not text.strip():
        raise CalibrationError(Problem("--text", file, "a file with text in it", remedy="give another file"))
    return text


def _unrepeated(text: str) -> str:
    """Every paragraph once: topics of the language reference quote each other, and what is held out must be unseen."""
    return "\n\n".join(dict.fromkeys(text.split("\n\n")))


def _ids(subject: Subject, text: str) -> list[int]:
    return _tokenize(subject.tokenizer, text)


def _tokenize(tokenizer: object, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[operator]  # transformers types no call
    return ids


def _question(subject: Subject, name: str, value: str) -> list[int]:
    """The question without its last space where the tokenizer wants a space inside the first token of the value."""
    text = asking(name)
    whole = _ids(subject, text + value)
    split = [ids for ids in (_ids(subject, text), _ids(subject, text.rstrip(" "))) if whole[: len(ids)] == ids]
    return split[0] if split else _ids(subject, text)


def _value_tokens(subject: Subject, sentence: str, value: str) -> range:
    """Which tokens of the sentence hold a character of the value."""
    start = sentence.rindex(value)
    offsets = subject.tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    held = [index for index, (a, b) in enumerate(offsets) if a < start + len(value) and b > start]
    return range(held[0], held[-1] + 1)


def _template(subject: Subject) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens before and after a message that the model is asked with."""
    tokenizer = subject.tokenizer
    if not tokenizer.chat_template:
        return tokenizer("").input_ids, []
    message = [{"role": "user", "content": MARK}]
    before, after = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False).split(MARK)
    return _ids(subject, before), _ids(subject, after)
