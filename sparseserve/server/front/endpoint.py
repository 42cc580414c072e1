"""What stands before vLLM's routes: keys, limits, options of requests, readiness."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.responses import Response

from sparseserve.environment import max_request_bytes
from sparseserve.plugin.settings import policy_of
from sparseserve.policies import Policy
from sparseserve.server.front.counters import CountMiddleware, announce
from sparseserve.server.front.drain import Drain, DrainMiddleware, readiness
from sparseserve.server.front.limits import BodyMiddleware, KeyMiddleware, api_keys
from sparseserve.server.front.options import OptionReader, OptionsMiddleware
from sparseserve.server.front.outcome import OutcomeMiddleware
from sparseserve.server.front.refusals import RefusalMiddleware

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class FrontEndpoint:
    """vLLM endpoint plugin (`vllm.endpoint_plugins`)."""

    name = "sparseserve_front"
    required_tasks: tuple[Any, ...] | None = None

    def __init__(self) -> None:
        self._engine_client: EngineClient | None = None
        self._state = State()

    def attach_router(self, app: FastAPI) -> None:
        """Add /ready and the middleware, innermost first; all of it runs inside vLLM's own."""
        args: Namespace = app.state.args
        drain = Drain(args.shutdown_timeout)
        app.add_middleware(RefusalMiddleware)
        policy = policy_of(args)  # the arguments have vLLM's additional_config, too
        if policy is not None:
            self._follow_policy(app, policy, args)
        app.add_middleware(BodyMiddleware, limit=max_request_bytes())
        app.add_middleware(DrainMiddleware, drain=drain)
        app.add_middleware(CountMiddleware)
        if keys := api_keys(args):
            app.add_middleware(KeyMiddleware, keys=keys)

        @app.get("/ready", responses={503: {"description": "draining or unhealthy"}})
        async def ready() -> Response:
            """Whether new requests are welcome."""
            return await readiness(drain, self._engine_client)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keep the way to the workers and to the names that are served."""
        self._engine_client, self._state = engine_client, state

    def _follow_policy(self, app: FastAPI, policy: Policy, args: Namespace) -> None:
        announce(policy.name)
        if policy.recall_sample:
            app.add_middleware(OutcomeMiddleware, ask=self._ask)
        # vLLM loads every logits processor that is installed.
        others = bool(args.logits_processors) or bool(entry_points(group="vllm.logits_processors"))
        app.add_middleware(OptionsMiddleware, reader=OptionReader(policy, others), names=self._names)

    def _names(self) -> Sequence[str]:
        """Served models, and LoRA adapters, which come and go."""
        models = self._state.openai_serving_models
        return [*(model.name for model in models.base_model_paths), *models.lora_requests]

    async def _ask(self, request_id: str) -> list[dict[str, Any] | None]:
        assert self._engine_client is not None
        answers: list[dict[str, Any] | None] = await self._engine_client.collective_rpc(
            "sparseserve_outcome", args=(request_id,)
        )
        return answers
