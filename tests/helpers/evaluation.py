"""Stand-ins: a tokenizer to count with, and a server that answers needle questions without a model."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sparseserve.evaluation.client import Client
from sparseserve.evaluation.evaluation import Evaluation, Setting
from sparseserve.server.launch.process import Server

ASKED = re.compile(r"The pass key of (\w+) is ?$")


class FakeClient(Client):
    """Counts tokens without a server: bytes, or words and pieces of up to three letters of them."""

    def __init__(self, split: str) -> None:
        self.split, self.counted = split, 0
        self._model, self._chats, self._spaces = "fake", False, split == "bytes"
        self._size = self._token_size()

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """Like a BPE, in that some texts get longer without more tokens."""
        pieces = list(text) if self.split == "bytes" else re.findall(r"\s?\w{1,3}|[^\w]", text)
        return [256] * special + [min(255, ord(piece[-1])) for piece in pieces]

    def count(self, prompt: str) -> int:
        """With the token that begins a prompt."""
        return len(self.tokens(prompt, special=True))

    def _tokenize(self, **body: Any) -> Any:
        self.counted += 1
        return {"count": self.count(body["prompt"])}


class _Handler(BaseHTTPRequestHandler):
    """The endpoints that an evaluation uses, for a byte tokenizer and no chat template."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake: FakeServer = self.server.fake  # type: ignore[attr-defined]  # put there below
        if self.path == "/v1/models":
            self._send({"object": "list", "data": [{"id": "fake", "object": "model", "max_model_len": fake.max_len}]})
        else:
            self._send(fake.metrics(), "text/plain")

    def do_POST(self) -> None:
        fake: FakeServer = self.server.fake  # type: ignore[attr-defined]  # put there below
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.requests.append((self.path, body))
        if "messages" in body:
            self._send({"error": {"message": "no chat template", "code": 400}}, status=400)
        elif self.path == "/tokenize":
            self._send({"count": len(body["prompt"]), "tokens": list(body["prompt"].encode())})
        elif fake.dies():
            fake.process.kill()
            self.close_connection = True
        else:
            self._send("".join(f"data: {event}\n\n" for event in fake.events(body)), "text/event-stream")

    def _send(self, content: Any, kind: str = "application/json", status: int = 200) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class FakeServer:
    """Answers needle questions right, until it dies at the question number `dies_at`."""

    def __init__(self, process: subprocess.Popen[bytes], max_len: int = 9000, dies_at: int | None = None) -> None:
        self.process, self.max_len, self.dies_at = process, max_len, dies_at
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.asked = 0

    def dies(self) -> bool:
        """Whether this request is the last."""
        self.asked += 1
        return self.asked == self.dies_at

    def events(self, body: dict[str, Any]) -> Iterator[str]:
        """The chunks of a streamed answer, a byte each."""
        (name,) = ASKED.search(body["prompt"]).groups()  # type: ignore[union-attr]  # every prompt asks
        answer = re.search(rf"The pass key of {name} is (\w+)\.", body["prompt"])[1]  # type: ignore[index]  # every prompt tells it
        common = {"id": "1", "object": "text_completion", "created": 0, "model": "fake"}
        for letter in answer:
            choice = {"index": 0, "text": letter, "token_ids": [ord(letter)], "finish_reason": None}
            yield json.dumps(common | {"choices": [choice]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 8, "total_tokens": 0}
        yield json.dumps(common | {"choices": [], "usage": usage})
        yield "[DONE]"

    def metrics(self) -> str:
        """A quarter of what is resident is attended to."""
        counts = {"attended": 100 * self.asked, "resident": 400 * self.asked}
        return "".join(f'sparseserve_kv_tokens_{kind}_total{{role="select"}} {n}\n' for kind, n in counts.items())


class Fakes:
    """Serves settings with fake servers, and remembers them."""

    def __init__(self, folder: Path, make: Callable[..., FakeServer] = FakeServer) -> None:
        self.folder, self.make = folder, make
        self.served: list[str] = []
        self.servers: list[FakeServer] = []

    @contextmanager
    def __call__(self, request: Evaluation, setting: Setting) -> Iterator[Server]:
        process = subprocess.Popen(["sleep", "1000"])
        (log := self.folder / "log").write_text("loading ... Killed")
        http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        http.fake = fake = self.make(process)  # type: ignore[attr-defined]  # for its handlers
        self.served.append(str(setting))
        self.servers.append(fake)
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield Server(f"http://127.0.0.1:{http.server_port}", process, log)
        finally:
            http.shutdown()
            process.kill()
