"""What no request passes: a key for everything but a few paths, and a cap on the size of bodies."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus

import vllm.envs as envs
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from sparseserve.server.front.asgi import error, path_of

OPEN = {"/health", "/ready", "/ping", "/metrics", "/version", "/sparsity"}  # GET, without a key
BODILESS = {"GET", "HEAD", "OPTIONS"}


def api_keys(args: Namespace) -> list[str]:
    """The keys that vLLM's own middleware takes."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


class KeyMiddleware:
    """Asks for the key on every path but the open ones; vLLM's own middleware leaves out all outside four prefixes."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._check = app, AuthenticationMiddleware(app, list(keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app if self._may_pass(scope) else JSONResponse({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
        await app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return True
        is_open = scope.get("method") == "GET" and path_of(scope) in OPEN
        return is_open or bool(self._check.verify_token(Headers(scope=scope)))


class BodyMiddleware:
    """Reads the whole body, of at most `limit` bytes, before anything else looks at it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in BODILESS:
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "0")
        with suppress(ClientDisconnect):
            body = None if told.isdecimal() and int(told) > self._limit else await self._read(receive)
            if body is None:
                message = f"The request body is larger than {self._limit} bytes, the server's --max-request-bytes."
                return await error(scope, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)(scope, receive, send)
            await self._app(scope, replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None when it is too large. ClientDisconnect when it does not come to its end."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message["body"]
            more = message.get("more_body", False)
            if len(body) > self._limit:
                return None
        return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` at once, then what the server tells."""
    first = True

    async def again() -> Message:
        nonlocal first
        if not first:
            return await receive()
        first = False
        return {"type": "http.request", "body": body, "more_body": False}

    return again
