"""Streams that vLLM refuses: it says 200 before it asks the engine, and the refusal is the first event."""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparseserve.server.front.asgi import is_inference

DATA = b'data: {"error"'
STREAMED_ERRORS = (DATA, b"event: error", b"event: response.failed")  # how vLLM's routes tell of an error in a stream


class RefusalMiddleware:
    """Gives a stream whose first event is an error the error's own status, as the same request without a stream has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_inference(scope):
            return await self._app(scope, receive, send)
        await self._app(scope, receive, _Stream(scope, receive, send).send)


class _Stream:
    """An answer whose start waits for its first event."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._start: Message | None = None
        self._refused = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_stream(message):
            self._start = message
        elif self._start is not None:
            await self._first(self._start, message)
            self._start = None
        elif not self._refused:
            await self._send(message)

    async def _first(self, start: Message, message: Message) -> None:
        error = refusal(message.get("body", b""))
        if error is None:
            await self._send(start)
            return await self._send(message)
        self._refused = True  # what follows says that the stream is over
        await error(self._scope, self._receive, self._send)


def refusal(body: bytes) -> JSONResponse | None:
    """The error that a stream begins with, as a response."""
    if not body.startswith(DATA):
        return None
    try:
        answer = json.loads(body.partition(b"\n")[0].removeprefix(b"data: "))
        return JSONResponse(answer, HTTPStatus(answer["error"]["code"]))
    except (ValueError, KeyError, TypeError):
        return None


def _is_stream(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] == HTTPStatus.OK and kind.startswith("text/event-stream")
