"""What the policy did for a request, as `usage.sparsity` of its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.logger import init_logger

from sparseserve.server.front.asgi import is_inference, path_of, set_header

TIMEOUT = 10.0  # seconds; the workers answer between two steps
OTHER_NAMES = {"/v1/responses", "/v1/chat/completions/batch"}  # vLLM does not name these by X-Request-Id
NAMED = "sparseserve_named"  # key of the scope: the body has the request's name
EVENT = b"data: "
EVENT_END = b"\n\n"
Ask = Callable[[str], Awaitable[list[dict[str, Any] | None]]]  # a request's id; one answer of each worker
log = init_logger(f"vllm.{__name__}")  # vLLM shows what its own loggers say


class OutcomeMiddleware:
    """Names every request, asks the workers about it by that name, and holds back only what carries the usage.

    A client's X-Request-Id stays a part of the name. One whose body names it keeps that name, and is told nothing.
    """

    def __init__(self, app: ASGIApp, ask: Ask) -> None:
        self._app, self._ask = app, ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        if not is_inference(scope) or path_of(scope) in OTHER_NAMES or (scope.get(NAMED) and not given):
            return await self._app(scope, receive, send)
        name = uuid4().hex  # clients may repeat theirs
        set_header(scope, b"x-request-id", f"{given}-{name}".lstrip("-").encode("latin-1"))
        await self._app(scope, receive, AnswerStream(name, self._ask, send).send)


class AnswerStream:
    """One answer on its way to the client."""

    def __init__(self, name: str, ask: Ask, send: Send) -> None:
        self._name, self._ask, self._send = name, ask, send
        self._held: Message | None = None  # the start of a JSON answer
        self._body = bytearray()
        self._stream = False

    async def send(self, message: Message) -> None:
        """Send on, with the usage completed."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._held is not None:
            await self._collect(self._held, message)
        elif self._stream and b'"usage"' in message.get("body", b""):
            events = message["body"].split(EVENT_END)
            body = EVENT_END.join([await self._event(event) for event in events])
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        kind = Headers(raw=message["headers"]).get("content-type", "") if message["status"] == HTTPStatus.OK else ""
        self._stream = kind.startswith("text/event-stream")
        if kind.startswith("application/json"):
            self._held = message
        else:
            await self._send(message)

    async def _collect(self, start: Message, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = await self._complete(bytes(self._body))
        MutableHeaders(scope=start)["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _event(self, event: bytes) -> bytes:
        text = event.removeprefix(EVENT)
        return EVENT + await self._complete(text, last=True) if text != event else event

    async def _complete(self, text: bytes, last: bool = False) -> bytes:
        """JSON with what the workers know in its usage; of a stream's chunks only the one without choices."""
        try:
            answer = json.loads(text)
            if not isinstance(answer, dict) or not isinstance(answer.get("usage"), dict):
                return text  # also the null that vLLM answers to a client that went away
            if last and answer.get("choices") != []:
                return text
            answers = await asyncio.wait_for(self._ask(self._name), TIMEOUT)
            known = [outcome for outcome in answers if outcome is not None]
            if known:
                answer["usage"]["sparsity"] = merged(known)
                text = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
        except Exception:  # whatever went wrong, the answer is right as it is
            log.warning("no outcome for request %s", self._name, exc_info=True)
        return text


def merged(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of ranks, each of which guards its own heads: the least recall, and the most that any had to do."""
    return {
        "policy": outcomes[0]["policy"],
        "dense": any(one["dense"] for one in outcomes),
        "budget_tokens": max(one["budget_tokens"] for one in outcomes),
        "recall": min((one["recall"] for one in outcomes if one["recall"] is not None), default=None),
        "widened": max(one["widened"] for one in outcomes),
        "reason": next((one["reason"] for one in outcomes if one["reason"]), ""),
    }
