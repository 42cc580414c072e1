"""What the kernel path counts, as prometheus metrics of the worker process.

With several API servers vLLM sets PROMETHEUS_MULTIPROC_DIR and the values reach every /metrics through its files; with
one, `server/metrics.py` asks for `snapshot()` at each scrape.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge
from vllm.v1.kv_cache_interface import AttentionSpec

from sparseserve import ops
from sparseserve.plugin.metadata import RowSplit
from sparseserve.policies import Policy
from sparseserve.types import LayerPlan, Role, Step

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
    "sparseserve_dense_rows", "Rows that took vLLM's own attention, by reason.", ["policy", "reason"], registry=WORKER
)
KV_BYTES = Gauge(
    "sparseserve_kv_bytes",
    "Bytes of the KV cache by what they hold.",
    ["kind"],
    registry=WORKER,
    multiprocess_mode="sum",
)


class Meter:
    """Counts one engine's steps."""

    def __init__(self, policy: Policy, plans: list[LayerPlan]) -> None:
        self._policy = policy.name
        self._layers = {role: [plan for plan in plans if plan.role is role] for role in Role}
        labels = {"policy": policy.name, "backend": "CPU_ATTN", "runner": "V1", "isa": ops.isa()}
        INFO.labels(**labels, version=version("sparseserve")).set(1)
        for role in Role:
            if self._layers[role]:
                ATTENDED.labels(policy.name, role.value)
                RESIDENT.labels(policy.name, role.value)
        self._decode_rows = DECODE_ROWS.labels(policy.name)
        self._dense_rows = {reason: DENSE_ROWS.labels(policy.name, reason) for reason in ("short", "prefill")}

    def set_kv_bytes(self, spec: AttentionSpec, pages: int, layers: int) -> None:
        """Report the size of the cache: `pages` pages in each of `layers` layers."""
        held = spec.unpadded_page_size_bytes
        KV_BYTES.labels("kv").set(pages * layers * held)
        KV_BYTES.labels("summaries").set(pages * layers * (spec.page_size_bytes - held))

    def count_rows(self, split: RowSplit) -> None:
        """Count the rows of a step by the path they take."""
        self._decode_rows.inc(split.sparse.shape[0])
        self._dense_rows["short"].inc(split.short)
        self._dense_rows["prefill"].inc(split.prefill)

    def count_tokens(self, step: Step) -> None:
        """Count what `attend` wrote into the step's buffers."""
        resident = int(step.table.seq_lens.sum())
        dense = step.attended_dense.sum((1, 2), dtype=torch.float64)
        selected = step.attended.mean(2, dtype=torch.float64).sum(1)
        for role, plans in self._layers.items():
            if not plans:
                continue
            attended = sum(float((dense if plan.dense_output else selected)[plan.layer]) for plan in plans)
            ATTENDED.labels(self._policy, role.value).inc(attended)
            RESIDENT.labels(self._policy, role.value).inc(resident * len(plans))


Snapshot = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]


def snapshot() -> Snapshot:
    """All metrics of this process: (name, help, type, [(sample name, labels, value)])."""
    return [
        (metric.name, metric.documentation, metric.type, [(s.name, s.labels, s.value) for s in metric.samples])
        for metric in WORKER.collect()
    ]
