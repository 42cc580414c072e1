"""What the API server counts itself."""

from __future__ import annotations

from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from prometheus_client import Counter, Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparseserve.server.front.asgi import is_inference
from sparseserve.server.front.refusals import STREAMED_ERRORS

CHOICE = "sparseserve_choice"  # key of the scope
CHOICES, OUTCOMES = ("default", "dense", "budget"), ("ok", "rejected", "aborted", "failed")
REQUESTS = Counter("sparseserve_requests", "Requests, by what they asked of the policy.", ["choice", "outcome"])
CONFIGURED = Gauge("sparseserve_configured", "1 for the configured policy.", ["policy"], multiprocess_mode="livemax")
DRAINING = Gauge("sparseserve_draining", "1 while the server finishes what runs.", multiprocess_mode="livemax")


def announce(policy: str) -> None:
    """Export the policy, and every counter from 0 on."""
    CONFIGURED.labels(policy).set(1)
    for choice in CHOICES:
        for outcome in OUTCOMES:
            REQUESTS.labels(choice, outcome)


def choose(scope: Scope, choice: str) -> None:
    """Tell the counter what a request asked for."""
    scope[CHOICE] = choice


class CountMiddleware:
    """Counts requests; vLLM counts none whose client went away."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_inference(scope):
            return await self._app(scope, receive, send)
        exchange = Exchange(receive, send)
        choose(scope, "default")
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            REQUESTS.labels(scope[CHOICE], exchange.outcome).inc()


class Exchange:
    """One request and its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._status, self._ended, self._gone, self._broken = 0, False, False, False

    async def receive(self) -> Message:
        message: MutableMapping[str, Any] = await self._receive()
        self._gone |= message["type"] == "http.disconnect" and not self._ended
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not self._gone:
            self._broken |= message.get("body", b"").startswith(STREAMED_ERRORS)
            self._ended = not message.get("more_body", False)
        await self._send(message)

    @property
    def outcome(self) -> str:
        """As the counter's label."""
        if self._gone:
            return "aborted"
        if self._status == HTTPStatus.SERVICE_UNAVAILABLE or 400 <= self._status < 500:
            return "rejected"
        return "ok" if self._ended and self._status < 400 and not self._broken else "failed"
