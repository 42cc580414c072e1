"""Seeded mixed traffic: what is sent, what comes back, and the memory that a server holds meanwhile."""

import json
import math
import random
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from statistics import linear_regression, mean, stdev
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from sparseserve.questions.needles import ask
from sparseserve.server.launch.process import Server

PATH = "/v1/completions"
JSON = {"Content-Type": "application/json"}
PARALLEL = 16
SAMPLE_EVERY = 10  # requests
PARTS = 5  # of which the growth of memory is the mean
WORKER = "VLLM::Worker"  # the name of its process
MAX_MODEL_LEN = 9216
LENGTHS = ((600, 0.2), (800, 0.7), (1100, 0.4), (1500, 0.6))  # tokens, depth
QUESTIONS = [ask(tokens, depth, seed=7, value_length=4) for tokens, depth in LENGTHS]

# Ways to ask, by what they ask of the policy.
WAYS: dict[str, list[dict[str, Any]]] = {
    "default": [{}, {"model": "demo@default"}, {"vllm_xargs": {"sparse_policy": "default"}}],
    "dense": [{"model": "demo@dense"}, {"vllm_xargs": {"sparse_policy": "dense"}}],
    "budget": [{"model": "demo@budget-512"}, {"vllm_xargs": {"sparse_budget_tokens": 512}}],
}
OUR_MISTAKES: list[dict[str, Any]] = [
    {"vllm_xargs": {"sparse_policy": "sparse"}},
    {"vllm_xargs": {"sparse_polcy": "dense"}},
    {"vllm_xargs": {"sparse_budget_tokens": -1}},
    {"vllm_xargs": {"sparse_budget_tokens": "512"}},
    {"vllm_xargs": {"sparse_budget_tokens": 10**9}},
    {"sparse_policy": "dense"},
    {"model": "demo@densee"},
]
MISTAKES: list[dict[str, Any]] = [
    {"prompt": "a" * MAX_MODEL_LEN},
    {"prompt": {}},
    {"max_tokens": -5},
    {"temperature": -1},
    {"model": "omed"},
]
TWICE = {"n": 2, "temperature": 1, "top_k": 1}  # vLLM refuses n with temperature 0
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
ENDLESS = {"max_tokens": 4000, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Sent:
    """What is sent, and what is to come of it."""

    body: bytes
    outcome: str  # as sparseserve_requests_total calls it
    choice: str = "default"
    question: int = 0
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """What came back."""

    request: Sent
    outcome: str
    texts: list[str]  # n of them; of an error its body
    sparsity: dict[str, Any] | None = None  # of the usage


@dataclass(slots=True)
class Run:
    """What came of some requests."""

    answers: list[Received] = field(default_factory=list)
    memory: list[tuple[int, int, int]] = field(default_factory=list)  # requests ended; bytes of the worker, of the rest

    def growth(self, processes: str) -> tuple[float, float]:
        """Bytes per request over the second half of the requests, and its standard error."""
        half = self.memory[len(self.memory) // 2 :]
        column = {"worker": 1, "rest": 2}[processes]
        size = len(half) // PARTS
        parts = [half[start : start + size] for start in range(0, size * PARTS, size)]
        ended = [[sample[0] for sample in part] for part in parts]
        held = [[sample[column] for sample in part] for part in parts]
        slopes = [linear_regression(*points).slope for points in zip(ended, held, strict=True)]
        return mean(slopes), stdev(slopes) / math.sqrt(PARTS)


def traffic(count: int, seed: int, ours: bool = True) -> list[Sent]:
    """So many requests, one in eight a mistake, one in ten cancelled; with our options or without."""
    draw = random.Random(seed)
    return [_mistake(draw, ours) if draw.random() < 1 / 8 else _question(draw, ours) for _ in range(count)]


def _mistake(draw: random.Random, ours: bool) -> Sent:
    wrong = draw.choice([None, *MISTAKES, *(OUR_MISTAKES if ours else [])])
    body = _body(0, {})
    return Sent(body[:-9] if wrong is None else _body(0, wrong), "rejected")


def _question(draw: random.Random, ours: bool) -> Sent:
    choice = draw.choice(list(WAYS)) if ours else "default"
    way = draw.choice(WAYS[choice]) if ours else {}
    question, stream, cancelled = draw.randrange(len(QUESTIONS)), draw.random() < 0.5, draw.random() < 1 / 10
    shape = ENDLESS if cancelled else draw.choice([{}, TWICE])
    body = _body(question, {**way, **shape, **(STREAM if stream else {})})
    return Sent(body, "aborted" if cancelled else "ok", choice, question, stream)


def alone(choice: str, question: int) -> Sent:
    """The plainest request for a choice."""
    return Sent(_body(question, WAYS[choice][0]), "ok", choice, question)


def _body(question: int, changes: dict[str, Any]) -> bytes:
    body = {"model": "demo", "prompt": QUESTIONS[question].prompt, "max_tokens": 5, "temperature": 0}
    return json.dumps(body | changes).encode()


def send(server: Server, requests: Sequence[Sent], parallel: int = PARALLEL) -> Run:
    """Send all, so many at a time."""
    run, lock = Run(), threading.Lock()
    processes = _processes(server)

    def one(request: Sent) -> None:
        answer = _exchange(server.url, request)
        with lock:
            run.answers.append(answer)
            if len(run.answers) % SAMPLE_EVERY == 0:
                run.memory.append((len(run.answers), *_held(processes)))

    with ThreadPoolExecutor(parallel) as pool:
        for _ in pool.map(one, requests):
            pass
    return run


def _processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def _held(processes: Sequence[psutil.Process]) -> tuple[int, int]:
    """Resident bytes of the worker, and of the other processes."""
    worker = [process.memory_info().rss for process in processes if process.name() == WORKER]
    return sum(worker), sum(process.memory_info().rss for process in processes) - sum(worker)


def _exchange(url: str, request: Sent) -> Received:
    if request.outcome == "aborted" and not request.stream:
        return _hang_up(url, request)
    # A client of its own: threads that share one may wait for each other's connection.
    with httpx.stream("POST", url + PATH, content=request.body, headers=JSON, timeout=60, verify=False) as response:
        if response.status_code != 200:
            outcome = "rejected" if response.status_code < 500 else "failed"
            return Received(request, outcome, [response.read().decode()])
        lines = response.iter_lines()
        if request.outcome == "aborted":
            next(lines)
            return Received(request, "aborted", [])
        return _read(request, lines)


def _hang_up(url: str, request: Sent) -> Received:
    """Go away before an answer that takes longer."""
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", PATH, request.body, JSON)
    time.sleep(0.2)
    connection.close()
    return Received(request, "aborted", [])


def _read(request: Sent, lines: Iterable[str]) -> Received:
    """An answer to its end, streamed or not."""
    texts: dict[int, str] = {}
    usage: dict[str, Any] = {}
    for line in lines:
        data = line.removeprefix("data: ")
        event = json.loads(data) if data.startswith("{") else {"choices": []}
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return Received(request, "ok", list(texts.values()), usage.get("sparsity"))
