"""What breaks in production, done on purpose, with what must come of it."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

import httpx

from loadtest.checks import Check
from loadtest.metrics import scrape
from loadtest.prompts import Prompt, Writer, document, source
from loadtest.server import Server, serving, start, stop
from loadtest.setting import Setting
from loadtest.traffic import PATIENCE, Stream, complete, is_idle, streaming, wait_until_idle

LENGTH, SHORT = 2000, 300  # tokens of prompts
LONG_ANSWER = 400  # tokens
QUEUE = 8  # requests, --max-num-queued-reqs
CLIENTS = 4 * QUEUE
PAUSE = 3.0  # seconds that the worker stands still
SOON = 60.0  # seconds in which a server must have noticed


def chaos(setting: Setting, model: str, flags: Sequence[str], folder: Path, say: Callable[[str], None]) -> list[Check]:
    """Three servers: one survives and is then told to stop, one loses its worker, one has a bad artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = list[Check]()
    limited = [*flags, "--max-num-queued-reqs", str(QUEUE)]
    with serving(setting, model, limited, folder / "survivor.log") as server:
        for case in (aborted_clients, queue_overflow, stopped_worker, told_to_stop):
            say(case.__name__.replace("_", " "))
            checks += case(server, *_prompts(server, case.__name__))
    say("killed worker")
    with serving(setting, model, flags, folder / "killed.log") as server:
        checks += killed_worker(server, *_prompts(server, "killed"))
    say("corrupt artifact")
    return [*checks, *corrupt_artifact(model, flags, folder)]


def aborted_clients(server: Server, long: Prompt, short: Prompt) -> Iterator[Check]:
    """Clients go away in the middle of their answers."""
    with ExitStack() as open_streams:
        for _ in range(4):
            open_streams.enter_context(streaming(server, long.text, LONG_ANSWER, whole=True)).step()
        running = scrape(server).get("running")
    yield Check("clients go away: running before", "4", f"{running}", running == 4)
    sample = wait_until_idle(server)
    yield Check("afterwards: requests, KV cache in use", "none, 0", _state(sample), is_idle(sample))
    yield _answers("afterwards: a question", server, short)


def queue_overflow(server: Server, long: Prompt, short: Prompt) -> Iterator[Check]:
    """More at once than the queue takes, every second one a stream."""
    body = {"model": server.model, "prompt": long.text, "max_tokens": LONG_ANSWER, "temperature": 0}

    def ask(number: int) -> httpx.Response:
        with server.client(PATIENCE) as client:
            return client.post("/v1/completions", json=body | {"stream": number % 2 == 1})

    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = [*threads.map(ask, range(CLIENTS))]
    statuses = Counter(answer.status_code for answer in answers)
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    expected = {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
    yield Check(f"{CLIENTS} clients, a queue of {QUEUE}", "some 200, the others 503", counts, set(statuses) == expected)
    told = sum("retry-after" in answer.headers for answer in answers)
    refused = statuses[HTTPStatus.SERVICE_UNAVAILABLE]
    yield Check("the refused: Retry-After", f"{refused}", f"{told}", told == refused)
    good = sum(f"{long.answer}" in _text(answer) for answer in answers)
    yield Check("the others: right answers", f"{statuses[HTTPStatus.OK]}", f"{good}", good == statuses[HTTPStatus.OK])
    yield _answers("afterwards: a question", server, short)


def stopped_worker(server: Server, long: Prompt, short: Prompt) -> Iterator[Check]:
    """The worker stands still for a while, as under a debugger or a hypervisor that moves it."""
    alone = complete(server, long.text, LONG_ANSWER, whole=True)
    worker = server.worker()
    with streaming(server, long.text, LONG_ANSWER, whole=True) as stream:
        stream.step()
        worker.suspend()
        time.sleep(PAUSE)
        worker.resume()
        stream.rest()
    same = stream.text == alone.text and not stream.error and stream.tokens == LONG_ANSWER
    yield Check("worker stopped, then continued: the stream", "the answer of before", _ended(stream), same)
    yield _answers("afterwards: a question", server, short)


def told_to_stop(server: Server, long: Prompt, short: Prompt) -> Iterator[Check]:
    """SIGTERM while a client reads."""
    assert server.process is not None
    with streaming(server, long.text, LONG_ANSWER, whole=True) as stream:
        stream.step()
        server.process.send_signal(signal.SIGTERM)
        ready = _until(lambda: server.status("/ready") == HTTPStatus.SERVICE_UNAVAILABLE, SOON)
        refused = complete(server, short.text, 16)
        stream.rest()
    yield Check("SIGTERM with an open stream: /ready", "503", "503" if ready else "never 503", ready)
    unavailable = refused.status == HTTPStatus.SERVICE_UNAVAILABLE
    yield Check("a new request", "503", f"{refused.status}", unavailable)
    whole = stream.finish == "length" and stream.tokens == LONG_ANSWER and not stream.error
    yield Check("the open stream", f"whole, {LONG_ANSWER} tokens", _ended(stream), whole)
    code = server.wait(SOON)
    yield Check("exit code", "0", f"{code}", code == 0)


def killed_worker(server: Server, long: Prompt, short: Prompt) -> Iterator[Check]:
    """The kernel kills the worker, as it does where memory runs out."""
    with streaming(server, long.text, LONG_ANSWER, whole=True) as stream:
        stream.step()
        server.worker().kill()
        stream.rest()
    yield Check("worker killed: the open stream", "ends with an error", _ended(stream), bool(stream.error))
    code = server.wait(SOON)
    yield Check("exit code, for the supervisor to start it again", "not 0", f"{code}", code not in (None, 0))
    left = server.status("/health")
    yield Check("what still listens", "nothing", "nothing" if not left else f"/health {left}", not left)


def corrupt_artifact(model: str, flags: Sequence[str], folder: Path) -> Iterator[Check]:
    """A server starts again, and its artifact has been cut off."""
    artifact = folder / "corrupt.json"
    artifact.write_text('{"0": [1, 2], "1": [')
    server = start(Setting("retrieval", (f"artifact={artifact}",)), model, flags, folder / "corrupt.log")
    try:
        code = server.wait(2 * SOON)
    finally:
        stop(server)
    lines = (folder / "corrupt.log").read_text(errors="replace").splitlines()
    said = next((line for line in lines if line.startswith("sparseserve:")), "")
    yield Check("artifact cut off: exit code", "2", f"{code}", code == 2)
    named = artifact.name in said and "Traceback" not in "".join(lines)
    yield Check("its message", "names the file, no traceback", said[:300], named)


def _prompts(server: Server, name: str) -> tuple[Prompt, Prompt]:
    writer = Writer(f"chaos {name}", source(None), server.tokens(None).characters)
    return document(writer, LENGTH), document(writer, SHORT)


def _answers(of: str, server: Server, asked: Prompt) -> Check:
    """A short question, which every policy answers as dense attention does."""
    stream = complete(server, asked.text, 16)
    return Check(of, f"{asked.answer}", stream.text or stream.error[:200], f"{asked.answer}" in stream.text)


def _text(answer: httpx.Response) -> str:
    """Of a plain answer or of a stream, which has it in pieces."""
    streamed = "event-stream" in answer.headers.get("content-type", "")
    return Stream(answer).rest().text if streamed else answer.text


def _state(sample: dict[str, float]) -> str:
    waiting = sample.get("running", -1) + sample.get("waiting", -1)
    return f"{waiting:.0f}, {sample.get('kv_usage', -1):.3f}"


def _ended(stream: Stream) -> str:
    error = f", {stream.error[:120]}" if stream.error else ""
    return f"{stream.tokens} tokens, finish_reason {stream.finish or 'none'}{error}"


def _until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.1)
    return False
