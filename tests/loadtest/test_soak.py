"""What a soak calls drift, and what it calls noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from loadtest.scenario import LoadTestError
from loadtest.soak import Round, judge

MIB = 2**20


def rounds(rss: Callable[[int], float], fds: Callable[[int], float] = lambda _: 300) -> list[Round]:
    """Thirty rounds of ten seconds; `rss` in MiB."""
    held = {"kv_bytes:full": 100.0}
    return [Round(10.0 * i, rss(i) * MIB, fds(i), 0, "ABC.", True, held) for i in range(30)]


def differing(found: list[Round]) -> list[str]:
    return [check.of for check in judge(found) if not check.ok]


def test_a_steady_server_passes() -> None:
    draw = random.Random(0)
    assert differing(rounds(lambda _: 3000 + draw.uniform(-60, 60))) == []


def test_caches_that_fill_at_the_start_are_no_leak() -> None:
    assert differing(rounds(lambda i: 3000 if i > 8 else 2500 + 50 * i)) == []


def test_a_leak_is_told_through_noise() -> None:
    draw = random.Random(0)
    assert differing(rounds(lambda i: 3000 + 20 * i + draw.uniform(-60, 60))) == ["memory of all processes, MiB"]
    assert differing(rounds(lambda _: 3000, lambda i: 300 + i)) == ["file descriptors"]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"failed": 1}, "requests that failed"),
        ({"idle": False}, "rounds after which pages or requests were left"),
        ({"probe": "XYZ."}, "answers to the same question"),
        ({"held": {"kv_bytes:full": 164.0}}, "bytes held by the same row"),
    ],
)
def test_one_round_that_differs_is_enough(change: dict[str, object], told: str) -> None:
    found = rounds(lambda _: 3000)
    found[20] = replace(found[20], **change)  # type: ignore[arg-type]  # any field
    assert differing(found) == [told]


def test_empty_answers_are_no_answers() -> None:
    found = [replace(one, probe="") for one in rounds(lambda _: 3000)]
    assert differing(found) == ["answers to the same question"]


def test_too_few_rounds_tell_nothing() -> None:
    with pytest.raises(LoadTestError, match="5 rounds tell no slope"):
        judge(rounds(lambda _: 3000)[:5])
