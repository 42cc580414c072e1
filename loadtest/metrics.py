"""/metrics of the server, sampled beside a run."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.server import Server

EVERY = 1.0  # seconds

# What is kept of a sample: our key -> the metric's name; those with labels that matter get them behind a colon.
KEPT = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_preemptions_total": "preemptions",
    "sparseserve_kv_tokens_attended_total": "attended",
    "sparseserve_kv_tokens_resident_total": "resident",
    "sparseserve_attention_recall_sum": "recall_sum",
    "sparseserve_attention_recall_count": "recall_count",
    "sparseserve_kv_bytes": "kv_bytes",
    "sparseserve_kv_capacity_gain": "capacity_gain",
    "sparseserve_kv_pages_freed_total": "pages_freed",
    "sparseserve_dense_fallback_total": "fallbacks",
    "sparseserve_under_floor_total": "under_floor",
}
BY_KIND = {"kv_bytes"}
FAILED = "scrape_failed"

Sample = dict[str, float]


def read(text: str) -> Sample:
    """What we keep of an exposition, summed over labels but the kind of bytes."""
    found: Sample = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (key := KEPT.get(sample.name)) is not None:
                found[f"{key}:{sample.labels['kind']}" if key in BY_KIND else key] += sample.value
    return dict(found)


def scrape(server: Server) -> Sample:
    """A sample now, with its time in seconds; one that failed says so."""
    now = time.time()
    try:
        with server.client(10.0) as client:
            return {"time": now, **read(client.get("/metrics").raise_for_status().text)}
    except httpx.HTTPError:
        return {"time": now, FAILED: 1.0}


@contextmanager
def sampled(server: Server, path: Path) -> Iterator[None]:
    """Sample every second while the block runs, at its start and at its end, into JSON lines."""
    ended = threading.Event()
    with path.open("w") as file:

        def take() -> None:
            file.write(json.dumps(scrape(server)) + "\n")

        def work() -> None:
            while not ended.wait(EVERY):
                take()

        take()
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            take()


def read_samples(path: Path) -> list[Sample]:
    """The samples of a run; those that failed are left out."""
    samples: list[Sample] = [json.loads(line) for line in path.read_text().splitlines()]
    return [sample for sample in samples if FAILED not in sample]


@dataclass(frozen=True, slots=True)
class Observed:
    """What the server said of itself over one or more runs; None where it has no such metric or nothing happened."""

    density: float | None  # KV tokens attended / resident in decode steps
    recall: float | None  # mean of the sampled softmax mass kept
    peak_kv_usage: float | None  # share of the KV cache, 0 to 1
    peak_kv_bytes: float | None  # that rows held
    capacity_gain: float | None  # rows that fit, against dense attention
    peak_waiting: float | None  # requests
    preemptions: float
    fallbacks: float  # requests that went dense


def observe(runs: Sequence[Sequence[Sample]]) -> Observed:
    """Counters by what each run added, gauges by their peak."""
    samples = [sample for run in runs for sample in run]
    resident, measured = _added(runs, "resident"), _added(runs, "recall_count")
    return Observed(
        density=_added(runs, "attended") / resident if resident else None,
        recall=_added(runs, "recall_sum") / measured if measured else None,
        peak_kv_usage=_peak([sample.get("kv_usage") for sample in samples]),
        peak_kv_bytes=_peak([kv_bytes(sample) for sample in samples]),
        capacity_gain=_peak([sample.get("capacity_gain") for sample in samples]),
        peak_waiting=_peak([sample.get("waiting") for sample in samples]),
        preemptions=_added(runs, "preemptions"),
        fallbacks=_added(runs, "fallbacks"),
    )


def kv_bytes(sample: Sample, kinds: Sequence[str] = ("full", "window", "summaries")) -> float | None:
    """Bytes that rows hold; None without the metric."""
    found = [sample[f"kv_bytes:{kind}"] for kind in kinds if f"kv_bytes:{kind}" in sample]
    return sum(found) if found else None


def _added(runs: Sequence[Sequence[Sample]], key: str) -> float:
    return sum(run[-1].get(key, 0.0) - run[0].get(key, 0.0) for run in runs if run)


def _peak(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
