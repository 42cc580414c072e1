"""Single streamed requests, for what a benchmark does not do: going away, and looking closely at what came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.metrics import Sample, scrape
from loadtest.server import Server

PATIENCE = 300.0  # seconds without a byte
IDLE = ("running", "waiting", "kv_usage")


@dataclass(slots=True)
class Stream:
    """A completion that arrives piece by piece."""

    response: httpx.Response
    text: str = ""
    finish: str = ""  # finish_reason
    error: str = ""
    tokens: int = 0
    _lines: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self._lines = self.response.iter_lines()

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.response.status_code

    def step(self) -> bool:
        """Take the next piece; False at the end, also at a broken one, which `error` tells."""
        try:
            line = next((line for line in self._lines if line.startswith("data: ")), "data: [DONE]")
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"
            return False
        if line == "data: [DONE]":
            return False
        self._take(json.loads(line.removeprefix("data: ")))
        return True

    def rest(self) -> Stream:
        """Read to the end."""
        while self.step():
            pass
        return self

    def _take(self, piece: dict[str, Any]) -> None:
        if "error" in piece:
            self.error = str(piece["error"])
        for choice in piece.get("choices", []):
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish
            self.tokens += 1  # pieces, until the end tells
        self.tokens = (piece.get("usage") or {}).get("completion_tokens", self.tokens)


@contextmanager
def streaming(server: Server, prompt: str, max_tokens: int, whole: bool = False) -> Iterator[Stream]:
    """A greedy completion; `whole` goes on after the end that the model sees. Leaving the block early is going away."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": whole, "stream_options": {"include_usage": True}}
    with server.client(PATIENCE) as client, client.stream("POST", "/v1/completions", json=body) as response:
        stream = Stream(response)
        if response.is_error:
            response.read()
            stream.error = response.text
        yield stream


def complete(server: Server, prompt: str, max_tokens: int, whole: bool = False) -> Stream:
    """A whole one."""
    with streaming(server, prompt, max_tokens, whole) as stream:
        return stream.rest() if stream.status == httpx.codes.OK else stream


def wait_until_idle(server: Server, seconds: float = 30.0) -> Sample:
    """The sample in which nothing runs and no page is in use, or the last one when that does not come."""
    deadline = time.monotonic() + seconds
    while True:
        sample = scrape(server)
        if is_idle(sample) or time.monotonic() > deadline:
            return sample
        time.sleep(0.2)


def is_idle(sample: Sample) -> bool:
    """Nothing runs or waits, and no page of the KV cache is in use."""
    return all(sample.get(key) == 0 for key in IDLE)
