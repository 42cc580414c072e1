"""Stand-ins: a server with the endpoints that a load test asks, and `vllm bench serve` without vLLM."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loadtest.scenario import LoadTestError, Scenario

ASKED = re.compile(r"The pass key of (\w+) is ?$")
Answer = Callable[[str], str | None]  # of a model and a prompt; None: an error


def scenario(**changes: Any) -> Scenario:
    """A small one."""
    content: dict[str, Any] = {
        "name": "small",
        "about": "A small one.",
        "prompts": {"kind": "documents", "lengths": [600, 900]},
        "answers": "needle",
        "output_tokens": 16,
        "requests": 4,
        "loads": [{"concurrency": 1}, {"concurrency": 2}],
        "slo": {"ttft": 1000, "tpot": 50},
        "warm_up": 1,
        "repeats": 3,
    }
    return Scenario.model_validate(content | changes)


def right(prompt: str) -> str:
    """The pass key that is asked for."""
    (name,) = ASKED.search(prompt).groups()  # type: ignore[union-attr]  # every prompt asks
    return re.search(rf"The pass key of {name} is (\w+)\.", prompt)[1] + "."  # type: ignore[index]  # every prompt tells it


class FakeBench:
    """Answers a dataset at once, with latencies that `speed` scales by the served model."""

    def __init__(self, answer: dict[str, Answer], speed: dict[str, float]) -> None:
        self.answer, self.speed = answer, speed
        self.asked: list[list[str]] = []

    def run(self, words: Sequence[str]) -> None:
        self.asked.append(list(words))
        flags = dict(zip(words, words[1:], strict=False))
        rows = [json.loads(line) for line in Path(flags["--dataset-path"]).read_text().splitlines()]
        model = flags["--served-model-name"]
        texts = [self.answer.get(model, right)(row["prompt"]) for row in rows]
        step = 0.01 * self.speed.get(model, 1.0) * (1 + 0.02 * len(self.asked) % 3)
        lengths = [0 if text is None else len(text) for text in texts]
        result = {
            "duration": 1.0,
            "completed": sum(text is not None for text in texts),
            "failed": texts.count(None),
            "request_throughput": len(rows) / step,
            "request_goodput": len(rows) / step,
            "output_throughput": sum(lengths) / step,
            "input_lens": [len(row["prompt"]) for row in rows],
            "output_lens": lengths,
            "ttfts": [10 * step] * len(rows),
            "itls": [[step] * max(0, length - 1) for length in lengths],
            "latencies": [10 * step + step * max(0, length - 1) for length in lengths],
            "generated_texts": [text or "" for text in texts],
            "errors": ["Traceback:\n  ...\nConnectionError: gone" if text is None else "" for text in texts],
        }
        (Path(flags["--result-dir"]) / flags["--result-filename"]).write_text(json.dumps(result))

    @contextmanager
    def client(self, log: Path) -> Iterator[FakeBench]:
        """In place of `bench_client`."""
        log.write_text("")
        yield self


class BrokenBench(FakeBench):
    """Cannot run against one of the models."""

    def __init__(self, broken: str) -> None:
        super().__init__({}, {})
        self.broken = broken

    def run(self, words: Sequence[str]) -> None:
        if self.broken in words:
            raise LoadTestError("vllm bench serve failed: no first answer")
        super().run(words)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake: FakeServer = self.server.fake  # type: ignore[attr-defined]  # put there below
        if self.path == "/v1/models":
            self._send(json.dumps({"data": [{"id": "fake"}]}))
        elif self.path == "/metrics":
            self._send(fake.metrics())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        fake: FakeServer = self.server.fake  # type: ignore[attr-defined]  # put there below
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            ids = list(body["prompt"].encode())
            return self._send(json.dumps({"count": len(ids), "tokens": ids}))
        self._send("".join(f"data: {event}\n\n" for event in fake.events(body["prompt"])))

    def _send(self, content: str) -> None:
        data = content.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class FakeServer:
    """A byte tokenizer; a quarter of what is resident is attended to."""

    def __init__(self) -> None:
        self.scraped = 0
        self.dies = False

    def metrics(self) -> str:
        """As a server prints them."""
        self.scraped += 1
        return "\n".join(
            [
                "# TYPE sparseserve_kv_tokens_attended counter",
                f'sparseserve_kv_tokens_attended_total{{policy="quest",role="select"}} {100 * self.scraped}',
                "# TYPE sparseserve_kv_tokens_resident counter",
                f'sparseserve_kv_tokens_resident_total{{policy="quest",role="select"}} {400 * self.scraped}',
                "# TYPE sparseserve_kv_bytes gauge",
                'sparseserve_kv_bytes{kind="full"} 2097152',
                'sparseserve_kv_bytes{kind="window"} 1048576',
                'sparseserve_kv_bytes{kind="dense_equivalent"} 9437184',
                "# TYPE vllm:num_requests_running gauge",
                'vllm:num_requests_running{engine="0"} 0',
                "# TYPE vllm:num_requests_waiting gauge",
                'vllm:num_requests_waiting{engine="0"} 0',
                "# TYPE vllm:kv_cache_usage_perc gauge",
                'vllm:kv_cache_usage_perc{engine="0"} 0\n',
            ]
        )

    def events(self, prompt: str) -> Iterator[str]:
        """A streamed completion; of a dying server an error chunk in its middle."""
        answer = right(prompt)
        for place, letter in enumerate(answer):
            if self.dies and place == 3:
                yield json.dumps({"error": {"message": "EngineCore encountered an issue", "code": 500}})
                break
            finish = "stop" if place == len(answer) - 1 else None
            yield json.dumps({"choices": [{"index": 0, "text": letter, "finish_reason": finish}]})
        yield "[DONE]"

    @contextmanager
    def listening(self) -> Iterator[str]:
        """The URL of the server, for the block."""
        http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        http.fake = self  # type: ignore[attr-defined]  # for its handlers
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            http.server_close()
