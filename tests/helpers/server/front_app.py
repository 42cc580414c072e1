"""An app that stands for vLLM behind FrontEndpoint, and what it was sent."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI, Request
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.testclient import TestClient

from sparseserve.server.front.asgi import INFERENCE
from sparseserve.server.front.endpoint import FrontEndpoint
from sparseserve.server.front.options import PLACES

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

Outcome = dict[str, Any]
PATHS = sorted({*INFERENCE, *PLACES, "/tokenize", "/v1/messages/count_tokens"})
CHUNKS = [
    {"choices": [{"text": "a"}], "usage": None},
    {"choices": [{"text": "b"}], "usage": {"completion_tokens": 2}},
    {"choices": [], "usage": {"completion_tokens": 2}},
]


@dataclass
class Engine:
    """What FrontEndpoint asks of an engine."""

    outcomes: list[Outcome | None] | Exception = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    dead: bool = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Outcome | None]:
        self.asked.append((method, args))
        if isinstance(self.outcomes, Exception):
            raise self.outcomes
        return self.outcomes

    async def check_health(self) -> None:
        if self.dead:
            raise RuntimeError("engine died")


@dataclass
class Front:
    """The app behind FrontEndpoint."""

    client: TestClient
    app: FastAPI
    engine: Engine
    bodies: list[Any]
    requests: list[Request]

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return self.client.post(path, json=body, **more)


def make_front(
    policy: dict[str, Any] | None = None,
    *,
    served: tuple[str, ...] = ("demo",),
    answer: Callable[[Request], Any] | None = None,
    engine: Engine | None = None,
    **arguments: Any,
) -> Front:
    """FrontEndpoint in front of routes like vLLM's, under quest with a budget of 512 tokens."""
    settings = {"policy": "quest", "budget_tokens": 512} | (policy or {})
    args = Namespace(
        additional_config={"sparseserve": settings},
        **({"api_key": None, "logits_processors": None, "shutdown_timeout": 5} | arguments),
    )
    app, engine = FastAPI(), engine or Engine()
    made = Front(TestClient(app, raise_server_exceptions=False), app, engine, [], [])
    app.state.args = args

    async def endpoint(request: Request) -> Response:
        made.requests.append(request)
        raw = await request.body()
        made.bodies.append(_loads(raw))
        return (answer or _answer)(request)

    for path in PATHS:
        app.post(path)(endpoint)
    for path in ("/health", "/metrics", "/docs2"):
        app.get(path)(lambda: {})
    plugin = FrontEndpoint()
    plugin.attach_router(app)
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name=name) for name in served], lora_requests={})
    state = State({"openai_serving_models": models})
    with suppress(StopIteration):  # it waits for nothing
        plugin.init_state(cast("EngineClient", engine), state, args).send(None)  # it asks for nothing else
    return made


def _answer(request: Request) -> Response:
    return JSONResponse({"id": "x", "usage": {"completion_tokens": 1}})


def stream(request: Request) -> Response:
    """Chunks as vLLM sends them."""

    async def events() -> Any:
        for chunk in CHUNKS:
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _loads(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw
