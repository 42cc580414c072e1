"""Readiness, stopping, and what is counted, with requests that the test holds in its hand."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine
from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse, Response, StreamingResponse

from sparseserve.testing.waiting import wait_until
from tests.helpers.server.front_app import Engine

pytestmark = pytest.mark.vllm
PATH = "/v1/completions"


class Call:
    """One POST as a server runs it; the client may go away."""

    def __init__(self, app: Any, body: Any = None, path: str = PATH) -> None:
        self._app, self._body, self._path = app, json.dumps(body or {}).encode(), path
        self.messages: list[Any] = []
        self.gone = asyncio.Event()
        self._told = False

    async def run(self) -> None:
        scope = {"type": "http", "method": "POST", "path": self._path, "headers": [], "query_string": b""}
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if not self._told:
            self._told = True
            return {"type": "http.request", "body": self._body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


class Slow:
    """A streaming route that waits for the test between its first and its last chunk."""

    def __init__(self) -> None:
        self.finish = asyncio.Event()

    def __call__(self, request: Any) -> Response:
        async def chunks() -> Any:
            yield "first "
            await self.finish.wait()
            yield "last"

        return StreamingResponse(chunks())


def counted() -> dict[tuple[str, str], float]:
    samples = next(family for family in REGISTRY.collect() if family.name == "sparseserve_requests").samples
    return {
        (sample.labels["choice"], sample.labels["outcome"]): sample.value
        for sample in samples
        if sample.name.endswith("_total")
    }


def changed(before: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {key: value - before.get(key, 0) for key, value in counted().items() if value != before.get(key, 0)}


def in_loop(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


@pytest.mark.parametrize("timeout", [20, 0.1])
def test_a_drain_ends_streams_refuses_requests_and_stops_the_server(front: Any, timeout: float) -> None:
    async def work() -> None:
        slow, stopped, loop = Slow(), asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)  # as vLLM does
        server = front(answer=slow, shutdown_timeout=timeout)
        lifespan: asyncio.Queue[Any] = asyncio.Queue()
        lifespan.put_nowait({"type": "lifespan.startup"})
        up = asyncio.create_task(server.app({"type": "lifespan"}, lifespan.get, _ignore))
        call = Call(server.app)
        running = asyncio.create_task(call.run())
        await asyncio.to_thread(wait_until, lambda: call.text)
        assert (await asyncio.to_thread(server.client.get, "/ready")).status_code == 200

        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.02)
        ready, late = await asyncio.to_thread(server.client.get, "/ready"), Call(server.app)
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert int(ready.headers["retry-after"]) > 0
        assert REGISTRY.get_sample_value("sparseserve_draining") == 1
        await late.run()
        assert late.status == 503 and b"no new requests" in late.text
        assert (b"retry-after", b"1") in late.messages[0]["headers"]
        assert len(server.bodies) == 1 and (not stopped.is_set() or timeout < 1)
        if timeout > 1:
            slow.finish.set()
        await stopped.wait()
        await running
        assert call.text == (b"first last" if timeout > 1 else b"first ")
        lifespan.put_nowait({"type": "lifespan.shutdown"})
        await up

    in_loop(work())


async def _ignore(message: Any) -> None:
    pass


def test_a_dead_engine_is_not_ready(front: Any) -> None:
    engine = Engine()
    client = front(engine=engine).client
    assert client.get("/ready").status_code == 200
    engine.dead = True
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")


def test_a_full_queue_says_when_to_come_back(front: Any) -> None:
    def full(request: Any) -> Response:
        return JSONResponse({}, 503)

    assert front(answer=full).post(PATH, {}).headers["retry-after"] == "1"
    assert "retry-after" not in front().post(PATH, {}).headers


@pytest.mark.parametrize(
    ("body", "status", "key"),
    [
        ({"model": "demo"}, 200, ("default", "ok")),
        ({"model": "demo@dense"}, 200, ("dense", "ok")),
        ({"vllm_xargs": {"sparse_budget_tokens": 1024}}, 200, ("budget", "ok")),
        ({"model": "demo@dense"}, 404, ("dense", "rejected")),
        ({"model": "demo@typo"}, 200, ("default", "rejected")),
        ({"model": "demo"}, 503, ("default", "rejected")),
        ({"model": "demo"}, 500, ("default", "failed")),
    ],
)
def test_requests_are_counted(front: Any, body: dict[str, Any], status: int, key: tuple[str, str]) -> None:
    server, before = front(answer=lambda request: JSONResponse({}, status)), counted()
    server.post(PATH, body)
    server.post("/tokenize", body)  # runs no model
    server.client.get("/ready")
    assert changed(before) == {key: 1}


def test_crashes_are_counted_as_failed(front: Any) -> None:
    def crash(request: Any) -> Response:
        raise ZeroDivisionError

    server, before = front(answer=crash), counted()
    assert server.post(PATH, {}).status_code == 500
    assert changed(before) == {("default", "failed"): 1}


@pytest.mark.parametrize(
    ("path", "failure"),
    [
        (PATH, 'data: {"error": {"code": 500}}\n\n'),
        ("/v1/messages", 'event: error\ndata: {"type": "error"}\n\n'),
        ("/v1/responses", "event: response.failed\ndata: {}\n\n"),
    ],
)
def test_streams_that_end_with_an_error_are_counted_as_failed(front: Any, path: str, failure: str) -> None:
    def broken(request: Any) -> Response:
        return StreamingResponse(iter(["data: {}\n\n", failure, "data: [DONE]\n\n"]))

    server, before = front(answer=broken), counted()
    assert server.post(path, {}).status_code == 200
    assert changed(before) == {("default", "failed"): 1}


def test_clients_that_go_away_are_counted(front: Any) -> None:
    async def work() -> None:
        before, slow = counted(), Slow()
        call = Call(front(answer=slow).app, {"model": "demo@dense"})
        running = asyncio.create_task(call.run())
        await asyncio.to_thread(wait_until, lambda: call.text)
        call.gone.set()
        await running
        assert changed(before) == {("dense", "aborted"): 1}
        slow.finish.set()
        call = Call(front(answer=slow).app)
        await asyncio.gather(call.run())
        call.gone.set()  # after the end
        assert changed(before) == {("dense", "aborted"): 1, ("default", "ok"): 1}

    in_loop(work())


def test_the_configured_policy_is_exported(front: Any) -> None:
    front()
    assert REGISTRY.get_sample_value("sparseserve_configured", {"policy": "quest"}) == 1
