"""What stands before vLLM's routes: keys, limits, options of requests."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import State

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class FrontEndpoint:
    """vLLM endpoint plugin (`vllm.endpoint_plugins`)."""

    name = "sparseserve_front"
    required_tasks: tuple[Any, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Nothing yet."""

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Nothing yet."""
