"""The metrics of a worker process, by name.

With several API servers vLLM sets PROMETHEUS_MULTIPROC_DIR and the values reach every /metrics through its files; with
one, `server/views/metrics.py` asks for `meter.snapshot()` at each scrape.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

WORKER = CollectorRegistry()

INFO = Gauge(
    "sparseserve_info",
    "The active policy and what it runs on; always 1.",
    ["policy", "backend", "runner", "isa", "version"],
    registry=WORKER,
    multiprocess_mode="max",
)
ATTENDED = Counter(
    "sparseserve_kv_tokens_attended",
    "KV tokens that decode rows attended to, mean over query heads, summed over layers.",
    ["policy", "role"],
    registry=WORKER,
)
RESIDENT = Counter(
    "sparseserve_kv_tokens_resident",
    "KV tokens that the same rows held in the cache, summed over layers.",
    ["policy", "role"],
    registry=WORKER,
)
DECODE_ROWS = Counter(
    "sparseserve_decode_rows", "Rows decoded under the policy, one per request and step.", ["policy"], registry=WORKER
)
DENSE_ROWS = Counter(
    "sparseserve_dense_rows",
    "Rows that were not decoded under the policy, by reason. They attend to everything, but in their prompt (prefill) "
    "heads that store only a window attend to that.",
    ["policy", "reason"],
    registry=WORKER,
)


RECALL = Histogram(
    "sparseserve_attention_recall",
    "Share of the softmax mass that a layer's selection keeps, mean over query heads; one observation per measured row "
    "and layer.",
    ["policy", "layers"],
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999, 1),
    registry=WORKER,
)
OUTPUT_ERROR = Histogram(
    "sparseserve_attention_output_error",
    "Relative L2 error of a layer's output against dense attention, mean over query heads; observed as recall is.",
    ["policy", "layers"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
    registry=WORKER,
)
LAYER_RECALL = Summary(
    "sparseserve_layer_recall", "sparseserve_attention_recall by layer.", ["policy", "layer"], registry=WORKER
)
RECALL_FLOOR = Gauge(
    "sparseserve_recall_floor",
    "Share of the softmax mass that requests must keep; 0 without a floor.",
    ["policy"],
    registry=WORKER,
    multiprocess_mode="max",
)
UNDER_FLOOR = Counter(
    "sparseserve_under_floor",
    "Requests whose sampled recall stayed under the floor, by what was done; once each on every rank, which judges its "
    "own heads.",
    ["policy", "action"],
    registry=WORKER,
)
BUDGET_WIDENED = Counter(
    "sparseserve_budget_widened",
    "Times that a request's budget was doubled to raise its recall, on every rank.",
    ["policy"],
    registry=WORKER,
)
DENSE_FALLBACK = Counter(
    "sparseserve_dense_fallback",
    "Requests that the guard made dense: because of their recall, or at the largest budget; on every rank.",
    ["policy", "reason"],
    registry=WORKER,
)
IGNORED_OPTIONS = Counter(
    "sparseserve_ignored_options",
    "Requests with options that this policy cannot follow; the API server refuses them.",
    ["policy"],
    registry=WORKER,
)
SELF_CHECK = Gauge(
    "sparseserve_self_check",
    "1 once a step on real pages gave, in every layer, what the reference gives for the policy's selection.",
    ["policy"],
    registry=WORKER,
    multiprocess_mode="min",
)
KV_KINDS = ("full", "window", "summaries", "dense_equivalent")
KV_BYTES = Gauge(
    "sparseserve_kv_bytes",
    "Bytes that the rows of the latest step hold in the KV cache, a page that rows share counted for each: of heads "
    "that keep everything (full), of heads that keep a window (window), of page summaries (summaries); and what dense "
    "attention would hold (dense_equivalent). Empty slots of pages count. An idle server keeps the last values.",
    ["kind"],
    registry=WORKER,
    multiprocess_mode="sum",
)
PAGES_FREED = Counter(
    "sparseserve_kv_pages_freed",
    "Pages that left the windows of running rows, in all page tables; not those of rows that ended or were preempted, "
    "nor those that a prefix hit skipped.",
    registry=WORKER,
)
CAPACITY_GAIN = Gauge(
    "sparseserve_kv_capacity_gain",
    "How many times as many rows of the model's longest context the cache holds as it would under dense attention; "
    "below 1 where summaries take room.",
    registry=WORKER,
    multiprocess_mode="max",
)
