"""/v1/sparsity: the active policy, its plan and what it does, live; and /sparsity, a page that shows them."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.datastructures import State
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from sparseserve import environment
from sparseserve.plugin.settings import policy_of
from sparseserve.policies import Policy
from sparseserve.server.views.live import Live, live
from sparseserve.server.views.metrics import current_metrics
from sparseserve.server.views.page import page
from sparseserve.server.views.plan import Planner, PlanView
from sparseserve.server.views.policy import ActivePolicy, active_policy

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

LONGEST: dict[str, int] = {}  # bounds a length in the schema, once the model is known
NO_POLICY = "This server has no policy. Remedy: start it with `sparseserve serve MODEL --policy NAME`."


@dataclass(frozen=True, slots=True)
class Served:
    """What is served."""

    model: str
    policy: Policy
    planner: Planner


async def served(request: Request) -> Served:
    """What is served; 404 without an engine or a policy."""
    found: Served | None = request.app.state.sparseserve_served
    if found is None:
        raise HTTPException(404, NO_POLICY)
    return found


async def metrics(request: Request) -> CollectorRegistry:
    """The metrics, with the workers' latest numbers."""
    return await current_metrics(request.app.state)


What = Annotated[Served, Depends(served)]
Metrics = Annotated[CollectorRegistry, Depends(metrics)]
router = APIRouter(
    prefix="/v1/sparsity",
    tags=["sparsity"],
    responses={"4XX": {"model": ErrorResponse, "description": "not understood, not allowed, or no policy is served"}},
)


def bounded(schema: dict[str, Any]) -> None:
    """Add the longest length."""
    schema.update(LONGEST)


@router.get("")
def get_policy(what: What, registry: Metrics) -> ActivePolicy:
    """The active policy, its parameters, and what requests may ask of it."""
    return active_policy(what.policy, what.model, registry)


@router.get("/plan")
def get_plan(
    what: What,
    length: Annotated[
        int | None,
        Query(
            ge=1,
            description="tokens of the row; the model's longest context without",
            json_schema_extra=bounded,
        ),
    ] = None,
) -> PlanView:
    """What every layer and KV head reads in a decode step of one row."""
    longest = what.planner.max_length
    if length is not None and length > longest:
        error = {"type": "less_than_equal", "loc": ("query", "length"), "input": length, "ctx": {"le": longest}}
        message = f"Input should be less than or equal to {longest}, the longest context of this server"
        raise RequestValidationError([error | {"msg": message}])
    return what.planner.plan(longest if length is None else length)


@router.get("/live")
def get_live(what: What, registry: Metrics) -> Live:
    """What the policy did since the server's start."""
    return live(registry)


class RoutesEndpoint:
    """vLLM endpoint plugin (`vllm.endpoint_plugins`)."""

    name = "sparseserve_routes"
    required_tasks: tuple[Any, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the page where it was asked for."""
        app.state.sparseserve_served = None
        app.include_router(router)
        if os.environ.get(environment.PAGE) == "1":
            app.add_api_route("/sparsity", page, include_in_schema=False)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keep the policy and plan the layers, so that what cannot be planned is told at start-up."""
        config = None if engine_client is None else engine_client.vllm_config
        policy = None if config is None else policy_of(config)
        if config is not None and policy is not None:
            model = (args.served_model_name or [args.model])[0]
            state.sparseserve_served = Served(model, policy, Planner(config, policy))
            LONGEST["maximum"] = config.model_config.max_model_len
