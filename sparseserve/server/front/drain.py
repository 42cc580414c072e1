"""Stopping without losing answers: what runs is finished, what is new goes elsewhere."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparseserve.server.announce import announce_serving
from sparseserve.server.front.asgi import RETRY_AFTER, error, is_post
from sparseserve.server.front.counters import DRAINING

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class Drain:
    """Takes SIGTERM from vLLM, waits for the requests that run, and stops vLLM with SIGINT.

    vLLM would tell the engine at once and answer new requests with tracebacks; with several API servers it would
    also cut running streams. Its handlers of both signals are one.
    """

    def __init__(self, timeout: float) -> None:
        self.draining = False
        self.overdue = False
        self._timeout = timeout  # seconds
        self._running: set[asyncio.Task[Any]] = set()
        self._finishing: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Take SIGTERM; called once vLLM has set its handlers."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.start)
        announce_serving()

    def start(self) -> None:
        """Refuse new requests, and stop the server when the others have ended or the time is over."""
        if not self.draining:
            self.draining = True
            DRAINING.set(1)
            self._finishing = asyncio.create_task(self._finish())

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run `app` as one of the requests to wait for."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.overdue:
                raise
        finally:
            self._running.discard(task)

    async def _finish(self) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=self._timeout)
        self.overdue = True
        for task in self._running:
            task.cancel()  # vLLM frees what it holds, and need not wait once more
        signal.raise_signal(signal.SIGINT)


class DrainMiddleware:
    """Follows the requests that run; a 503, vLLM's own too, says when to come back."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._drain.listen()
        if not is_post(scope):
            return await self._app(scope, receive, send)
        if self._drain.draining:
            message = "The server finishes what runs and takes no new requests."
            busy = error(scope, HTTPStatus.SERVICE_UNAVAILABLE, message, headers=RETRY_AFTER)
            return await busy(scope, receive, send)

        async def with_retry(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                MutableHeaders(scope=message).setdefault("Retry-After", RETRY_AFTER["Retry-After"])
            await send(message)

        await self._drain.run(self._app, scope, receive, with_retry)


async def readiness(drain: Drain, engine_client: EngineClient | None) -> JSONResponse:
    """200 while new requests are welcome."""
    status: Mapping[str, str] = {"status": "ready"}
    if drain.draining:
        status = {"status": "draining"}
    elif engine_client is not None:
        try:
            await engine_client.check_health()
        except Exception as failure:  # EngineDeadError, or whatever the engine died of
            status = {"status": "unhealthy", "reason": type(failure).__name__}
    ready = status["status"] == "ready"
    return JSONResponse(status, 200 if ready else 503, None if ready else RETRY_AFTER)
