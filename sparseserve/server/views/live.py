"""GET /v1/sparsity/live: what the policy does, from the metrics."""

from __future__ import annotations

from time import time

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, Field

from sparseserve.server.views.samples import Samples


class RoleTokens(BaseModel):
    """KV tokens of decode rows, in the layers of one role."""

    role: str = Field(description="what the layers do: dense, select, reuse or window")
    attended: float = Field(description="tokens attended to, mean over query heads, summed over layers")
    resident: float = Field(description="tokens in the cache of the same rows, summed over layers")


class Bucket(BaseModel):
    """One bucket of a histogram."""

    at_most: float | None = Field(description="upper bound; null for the last bucket, which has none")
    count: float = Field(description="observations in this bucket alone")


class LayerValues(BaseModel):
    """What rows showed in neighbouring layers."""

    layers: str = Field(description='first and last layer, as "0-7"')
    mean: float | None = Field(description="mean over the observations; null before the first one")
    count: float = Field(description="observations: one row in one measured layer each")
    buckets: list[Bucket] = Field(description="the histogram, ascending")


class RequestCount(BaseModel):
    """Requests of one kind."""

    choice: str = Field(description="what they asked for: default, dense or budget")
    outcome: str = Field(description="ok, rejected, aborted or failed")
    count: float = Field(description="requests since the start")


class Live(BaseModel):
    """Counted since the server's start; null is not known or not measured."""

    time: float = Field(description="when this was read, Unix seconds")
    density: float | None = Field(description="tokens attended to / tokens resident, in rows under the policy")
    tokens: list[RoleTokens] = Field(description="what the density is made of")
    decode_rows: float | None = Field(description="rows decoded under the policy, one per request and step")
    dense_rows: dict[str, float] | None = Field(
        description="rows that attended to everything, by reason: short, prefill, request or guard"
    )
    recall: list[LayerValues] | None = Field(
        description="softmax mass that selections keep, 0 to 1; null unless recall_sample is above 0"
    )
    output_error: list[LayerValues] | None = Field(
        description="relative L2 error of layers' outputs against dense attention; null unless recall_sample is above 0"
    )
    recall_floor: float | None = Field(description="softmax mass that requests must keep; null without a floor")
    under_floor: dict[str, float] | None = Field(description="requests that stayed under the floor, by action")
    budget_widened: float | None = Field(description="times that a request's budget was doubled")
    dense_fallbacks: dict[str, float] | None = Field(
        description="requests that the guard made dense, by reason: recall or budget"
    )
    kv_bytes: dict[str, float] | None = Field(
        description="bytes that the rows of the latest step hold: full, window, summaries; dense_equivalent is what "
        "dense attention would hold"
    )
    capacity_gain: float | None = Field(
        description="how many times as many rows of the longest context the cache holds as under dense attention"
    )
    requests: list[RequestCount] | None = Field(description="requests by what they asked for and what became of them")
    draining: bool | None = Field(description="whether the server is shutting down and takes no new requests")


def live(registry: CollectorRegistry) -> Live:
    """What the metrics in `registry` say now."""
    samples = Samples(registry)
    attended, resident = (samples.by(f"kv_tokens_{name}_total", "role") or {} for name in ("attended", "resident"))
    held = sum(resident.values())
    draining = samples.total("draining")
    return Live(
        time=time(),
        density=sum(attended.values()) / held if held else None,
        tokens=[RoleTokens(role=role, attended=attended[role], resident=resident[role]) for role in attended],
        decode_rows=samples.total("decode_rows_total"),
        dense_rows=samples.by("dense_rows_total", "reason"),
        recall=_by_layers(samples, "attention_recall"),
        output_error=_by_layers(samples, "attention_output_error"),
        recall_floor=samples.total("recall_floor") or None,
        under_floor=samples.by("under_floor_total", "action"),
        budget_widened=samples.total("budget_widened_total"),
        dense_fallbacks=samples.by("dense_fallback_total", "reason"),
        kv_bytes=samples.by("kv_bytes", "kind"),
        capacity_gain=samples.total("kv_capacity_gain"),
        requests=_requests(samples),
        draining=None if draining is None else draining > 0,
    )


def _by_layers(samples: Samples, name: str) -> list[LayerValues] | None:
    sums, counts = (samples.by(f"{name}_{part}", "layers") or {} for part in ("sum", "count"))
    groups = sorted(counts, key=lambda layers: int(layers.partition("-")[0]))
    return [
        LayerValues(
            layers=group,
            mean=sums[group] / counts[group] if counts[group] else None,
            count=counts[group],
            buckets=_buckets(samples, name, group),
        )
        for group in groups
    ] or None


def _buckets(samples: Samples, name: str, layers: str) -> list[Bucket]:
    """The buckets of a group by themselves; prometheus counts each with all below it."""
    cumulated: dict[float, float] = {}
    for sample in samples.named(f"{name}_bucket"):
        if sample.labels["layers"] == layers:
            bound = float(sample.labels["le"])
            cumulated[bound] = cumulated.get(bound, 0.0) + sample.value
    bounds = sorted(cumulated)
    below = [0.0, *(cumulated[bound] for bound in bounds)]
    return [
        Bucket(at_most=None if bound == float("inf") else bound, count=cumulated[bound] - less)
        for bound, less in zip(bounds, below, strict=False)
    ]


def _requests(samples: Samples) -> list[RequestCount] | None:
    counts: dict[tuple[str, str], float] = {}
    for sample in samples.named("requests_total"):
        key = sample.labels["choice"], sample.labels["outcome"]
        counts[key] = counts.get(key, 0.0) + sample.value
    return [RequestCount(choice=c, outcome=o, count=count) for (c, o), count in sorted(counts.items())] or None
