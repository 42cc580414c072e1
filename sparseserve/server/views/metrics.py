"""The workers' metrics on the API server's own /metrics."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.v1.metrics.prometheus import get_prometheus_registry

from sparseserve import environment
from sparseserve.errors import SelfCheckError
from sparseserve.plugin.settings import policy_of
from sparseserve.server.front.asgi import path_of

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from sparseserve.plugin.watch.meter import Snapshot

ALIKE = {  # in all workers
    "sparseserve_info",
    "sparseserve_kv_capacity_gain",
    "sparseserve_recall_floor",
    "sparseserve_self_check",
}
SCRAPE_TIMEOUT = 2.0  # seconds; the engine answers between two steps, and a long prefill step may outlast a scrape


class WorkerMetrics(Collector):
    """The latest snapshot of all workers: counters and sizes summed, what is alike taken once."""

    def __init__(self) -> None:
        self._workers: list[Snapshot] = []
        self._pending: asyncio.Task[None] | None = None

    async def refresh(self, engine_client: EngineClient) -> None:
        """Ask the workers; keeps the last answer when the engine is too busy to give one in time."""
        if self._pending is None or self._pending.done():
            self._pending = asyncio.ensure_future(self._ask(engine_client))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._pending), SCRAPE_TIMEOUT)

    async def _ask(self, engine_client: EngineClient) -> None:
        self._workers = await engine_client.collective_rpc("sparseserve_stats")  # also when no scrape waits for it

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for name, documentation, kind, samples in chain.from_iterable(self._workers):
            families.setdefault(name, Metric(name, documentation, kind))
            for sample, labels, value in samples:
                key = (name, sample, tuple(labels.items()))
                values[key] = value if name in ALIKE else values.get(key, 0.0) + value
        for (name, sample, pairs), value in values.items():
            if not sample.endswith("_created"):
                families[name].add_sample(sample, dict(pairs), value)
        return families.values()


class ScrapeMiddleware:
    """Refreshes the workers' metrics before /metrics is answered."""

    def __init__(self, app: ASGIApp, endpoint: MetricsEndpoint) -> None:
        self._app, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope).rstrip("/") == "/metrics":
            await self._endpoint.refresh()
        await self._app(scope, receive, send)


class MetricsEndpoint:
    """vLLM endpoint plugin (`vllm.endpoint_plugins`)."""

    name = "sparseserve_metrics"
    required_tasks: tuple[Any, ...] | None = None

    def __init__(self) -> None:
        self._engine_client: EngineClient | None = None
        self.metrics = WorkerMetrics()

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware; with several API servers the workers' files already reach /metrics."""
        app.state.sparseserve_metrics = self
        if environment.PROMETHEUS not in os.environ:
            REGISTRY.register(self.metrics)
            app.add_middleware(ScrapeMiddleware, endpoint=self)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keep the way to the workers; SelfCheckError when they do not run the policy that is configured."""
        self._engine_client = engine_client
        if engine_client is not None and (policy := policy_of(engine_client.vllm_config)) is not None:
            check_active(policy.name, await _ask(engine_client))

    async def refresh(self) -> None:
        """Ask the workers for their numbers, if there is an engine."""
        if self._engine_client is not None:
            await self.metrics.refresh(self._engine_client)


async def _ask(engine_client: EngineClient) -> list[Snapshot]:
    try:
        answers: list[Snapshot] = await engine_client.collective_rpc("sparseserve_stats")
    except Exception as error:  # whatever vLLM makes of a method that its workers lack
        raise SelfCheckError(f"the workers are not sparseserve's, see --worker-cls ({error})") from error
    return answers


def check_active(policy: str, workers: list[Snapshot]) -> None:
    """Raise SelfCheckError unless every worker has checked its attention under `policy`."""
    for rank, snapshot in enumerate(workers):
        samples = (sample for name, _, _, samples in snapshot if name == "sparseserve_self_check" for sample in samples)
        if not any(labels == {"policy": policy} and value == 1 for _, labels, value in samples):
            raise SelfCheckError(f"worker {rank} of {len(workers)} has not checked its attention under {policy}")


async def current_metrics(state: State) -> CollectorRegistry:
    """What /metrics would say now."""
    registry: CollectorRegistry = get_prometheus_registry()
    endpoint: MetricsEndpoint | None = getattr(state, "sparseserve_metrics", None)
    if endpoint is not None and registry is REGISTRY:  # else the workers' files are read
        await endpoint.refresh()
    return registry
