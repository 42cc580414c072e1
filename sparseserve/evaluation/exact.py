"""Prompts of an exact number of tokens, found by counting a few of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from sparseserve.errors import ConfigError, SparseServeError
from sparseserve.questions.tasks import Draft

SLACK = 25  # the part of a document that its tail makes up for, at most, is 1 / SLACK
TRIES = 20

Count = Callable[[str], int]  # tokens of a prompt


def fit(draft: Draft, length: int, count: Count, token_size: float) -> str:
    """The prompt of exactly `length` tokens; `token_size` is a guess, in characters.

    First the document gets nearly its size. Then its tail makes up for what is missing: it moves nothing that stands
    before it, so tokens grow with it. Raises ConfigError when the length has no room.
    """

    def tokens_of(size: int, tail: int = 0) -> int:
        return count(draft.prompt(size, tail))

    slack = length // SLACK
    size = round((length - slack / 2) * token_size) - len(draft.prompt(0))
    for _ in range(TRIES):
        size, tokens = _where(tokens_of, (length - slack, length), size, token_size)
        if size == 0 and tokens > length:
            allowed = f"at least {tokens} tokens, for what must be asked"
            raise ConfigError("--lengths", length, allowed, remedy="give longer ones, or other tasks")
        tail = round((length - tokens) * token_size)
        tail, tokens = _where(partial(tokens_of, size), (length, length), tail, token_size)
        if tokens == length:
            return draft.prompt(size, tail)
        size -= 1  # no tail gives the length; another document
    raise SparseServeError(f"no prompt of exactly {length} tokens was found; give another length")


def _where(count: Callable[[int], int], between: tuple[int, int], at: int, slope: float) -> tuple[int, int]:
    """Characters, 0 or more, whose `count` lies between two numbers, and that count; the nearest if there are none.

    Regula falsi from the guess `at`, with `slope` characters per token until there are two points to tell it.
    """
    below = above = None
    at = max(0, at)
    for _ in range(TRIES):
        tokens = count(at)
        if between[0] <= tokens <= between[1]:
            break
        if tokens < between[0]:
            below = at, tokens
        else:
            above = at, tokens
        if below and above:
            slope = (above[0] - below[0]) / (above[1] - below[1])
        first, last = below[0] + 1 if below else 0, above[0] - 1 if above else sys.maxsize
        if first > last:
            break
        at = min(max(first, at + round((sum(between) / 2 - tokens) * slope)), last)
    return at, tokens
