"""Bits per byte of a user's text through decoding: every scored token is chosen by a decode step.

A prompt is prefilled densely, so scoring a prompt (`echo`) would say nothing of sparse decoding. Here a stretch of the
text is the prompt and what follows it is forced (plugin/forcing.py). The last token of the prompt's stretch is forced
first and not counted: that one the prefill decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sparseserve.errors import ConfigError
from sparseserve.evaluation.client import Client

FORCED_CHARACTERS = 256  # of one stretch; a token is at least a character
LONGEST_TOKEN = 16  # characters, the mean over a context at most


def bits(client: Client, text: str, length: int, stretches: int) -> tuple[float, int]:
    """Bits and bytes of at most so many stretches of the text, each behind `length` tokens of context."""
    total, counted = 0.0, 0
    begin = _begin(client)
    for start in _starts(client, text, length, stretches):
        context = [*begin, *_context(client, text, start, length)[len(begin) :]]
        if len(context) != length:
            raise _too_short(length)
        forced = text[start : start + FORCED_CHARACTERS]
        logprobs = client.force(context[:-1], [context[-1], *client.tokens(forced)])
        total -= sum(logprobs[1:]) / math.log(2)
        counted += len(forced.encode())
    return total, counted


def _begin(client: Client) -> list[int]:
    """The special tokens with which a prompt begins."""
    plain, whole = client.tokens("text"), client.tokens("text", special=True)
    return whole[: whole.index(plain[0])]


def _context(client: Client, text: str, start: int, length: int) -> list[int]:
    """The last `length` tokens before `start`, or what there is of them."""
    return client.tokens(text[max(0, start - length * LONGEST_TOKEN) : start])[-length:]


def _starts(client: Client, text: str, length: int, stretches: int) -> Iterator[int]:
    """Where stretches begin: evenly over the text, behind enough context, without overlap."""
    head = text[: length * LONGEST_TOKEN]
    first = math.ceil(1.1 * len(head) * length / len(client.tokens(head)))  # characters that hold `length` tokens
    while first < len(text) and len(_context(client, text, first, length)) < length:
        first += math.ceil(first / 10)  # the first of them are longer ones
    room = len(text) - first
    count = min(stretches, room // FORCED_CHARACTERS)
    if count < 1:
        raise _too_short(length)
    for index in range(count):
        yield first + index * (room // count)


def _too_short(length: int) -> ConfigError:
    allowed = f"a text of {length} tokens and {FORCED_CHARACTERS} characters at least"
    return ConfigError("--text", "too short", allowed, remedy="give a longer text, or shorter --lengths")
