"""A soak: rounds of traffic with clients that go away, and after each an idle server that must be as it was."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import psutil
from scipy import stats

from loadtest.checks import Check
from loadtest.metrics import Sample
from loadtest.prompts import Writer, document, source
from loadtest.scenario import LoadTestError
from loadtest.server import Server
from loadtest.traffic import complete, is_idle, streaming, wait_until_idle

LENGTHS = (300, 1200, 2500, 4000)  # tokens
REQUESTS, AT_ONCE = 12, 4  # of a round
GOES_AWAY = 0.25  # share of the clients
RSS_BAND = 0.05  # growth over the soak that counts as noise, as a share of the mean
FD_BAND = 8.0  # the same, file descriptors
LEAST_ROUNDS = 6
WARM_UP = 1 / 3  # share of the rounds: caches fill


@dataclass(frozen=True, slots=True)
class Round:
    """The server after a round, idle."""

    seconds: float  # since the start
    rss: float  # bytes, of all its processes
    fds: float
    failed: int  # requests of the round
    probe: str  # the answer to the same question as ever
    idle: bool
    held: dict[str, float]  # bytes by kind that the probe's row held in its last step


def soak(server: Server, minutes: float, say: Callable[[str], None]) -> list[Check]:
    """Rounds for so many minutes, then what they show."""
    writer = Writer("soak", source(None), server.tokens(None).characters)
    probe = document(writer, LENGTHS[2]).text
    draw, start, rounds = random.Random(0), time.monotonic(), list[Round]()
    while time.monotonic() - start < 60 * minutes or len(rounds) < LEAST_ROUNDS:
        rounds.append(_round(server, writer, draw, probe, start))
        last = rounds[-1]
        say(f"round {len(rounds)}, {last.seconds:.0f} s: {last.rss / 2**20:.0f} MiB, {last.fds:.0f} descriptors")
    return judge(rounds)


def judge(rounds: Sequence[Round]) -> list[Check]:
    """What a soak shows; LoadTestError for too few rounds."""
    if len(rounds) < LEAST_ROUNDS:
        raise LoadTestError(f"{len(rounds)} rounds tell no slope. Expected: at least {LEAST_ROUNDS}.")
    failed = sum(one.failed for one in rounds)
    busy = sum(not one.idle for one in rounds)
    probes = {one.probe for one in rounds}
    held = {tuple(sorted(one.held.items())) for one in rounds}
    return [
        Check("requests that failed", "0", str(failed), failed == 0),
        Check("rounds after which pages or requests were left", "0", str(busy), busy == 0),
        Check(
            "answers to the same question", "1, never empty", str(len(probes)), len(probes) == 1 and "" not in probes
        ),
        Check("bytes held by the same row", "the same after every round", _different(held), len(held) == 1),
        _growth("memory of all processes, MiB", rounds, lambda one: one.rss / 2**20, RSS_BAND),
        _growth("file descriptors", rounds, lambda one: one.fds, None),
    ]


def _round(server: Server, writer: Writer, draw: random.Random, probe: str, start: float) -> Round:
    prompts = [document(writer, draw.choice(LENGTHS)).text for _ in range(REQUESTS)]
    leaves = [draw.random() < GOES_AWAY for _ in prompts]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        done = list(threads.map(lambda pair: _request(server, *pair), zip(prompts, leaves, strict=True)))
    before = wait_until_idle(server)
    answer = complete(server, probe, 16)
    after = wait_until_idle(server)
    processes = server.processes()
    return Round(
        seconds=time.monotonic() - start,
        rss=_total(processes, lambda process: process.memory_info().rss),
        fds=_total(processes, lambda process: process.num_fds()),
        failed=done.count(False),
        probe=answer.text,
        idle=is_idle(before) and is_idle(after),
        held=_held(after),
    )


def _request(server: Server, prompt: str, leaves: bool) -> bool:
    """Whether it came as it should; a client that leaves reads the first piece."""
    if not leaves:
        stream = complete(server, prompt, 16)
        return bool(stream.finish) and not stream.error
    with streaming(server, prompt, 400, whole=True) as stream:
        stream.step()
        return not stream.error


def _growth(of: str, rounds: Sequence[Round], value: Callable[[Round], float], share: float | None) -> Check:
    """Growth over the soak, from a line through the rounds after the warm-up; its 95 % lower bound must be within the
    noise: a share of the mean, or FD_BAND."""
    late = rounds[round(WARM_UP * len(rounds)) :]
    values = [value(one) for one in late]
    line = stats.linregress([one.seconds for one in late], values)
    error = 0.0 if len(set(values)) == 1 else line.stderr  # scipy has NaN for a constant
    span = late[-1].seconds - late[0].seconds
    least = (line.slope - stats.t.ppf(0.95, len(late) - 2) * error) * span
    band = FD_BAND if share is None else share * sum(values) / len(values)
    found = f"{line.slope * span:+.1f} in {span:.0f} s, at least {least:+.1f}; {values[0]:.0f} to {values[-1]:.0f}"
    return Check(of, f"growth below {band:.1f}", found, bool(least <= band))


def _held(sample: Sample) -> dict[str, float]:
    return {key: value for key, value in sample.items() if key.startswith("kv_bytes:")}


def _different(held: set[tuple[tuple[str, float], ...]]) -> str:
    return "the same" if len(held) == 1 else f"{len(held)} different: {sorted(held)[:3]}"


def _total(processes: Sequence[psutil.Process], value: Callable[[psutil.Process], float]) -> float:
    """Over processes that live."""
    found = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += value(process)
    return found
