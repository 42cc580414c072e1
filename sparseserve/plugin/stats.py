"""What the kernel path counts, as prometheus metrics of the worker process.

With several API servers vLLM sets PROMETHEUS_MULTIPROC_DIR and the values reach every /metrics through its files; with
one, `server/metrics.py` asks for `snapshot()` at each scrape.
"""

from __future__ import annotations

from importlib.metadata import version
from time import monotonic
from weakref import WeakSet

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Summary
from torch import Tensor

from sparseserve import ops
from sparseserve.memory import Memory, StepMemory
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


class Sums(Summary):
    """A summary that takes many observations at once, which prometheus-client's own does not."""

    def add(self, total: float, count: float) -> None:
        """Add `count` observations with the sum `total`."""
        self._sum.inc(total)
        self._count.inc(count)


RECALL = Sums(
    "sparseserve_attention_recall",
    "Share of the softmax mass that a layer's selection keeps, one observation per decoded row, mean over query heads.",
    ["policy", "layer"],
    registry=WORKER,
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


class Meter:
    """Counts one engine's steps on the CPU."""

    def __init__(self, policy: Policy, plans: list[LayerPlan]) -> None:
        self._policy = policy.name
        measured = plans if policy.measure_recall else []
        self._recalls = {plan.layer: RECALL.labels(policy.name, plan.layer) for plan in measured}
        self._layers = {role: [plan for plan in plans if plan.role is role] for role in Role}
        INFO.labels(**self._labels(), policy=policy.name, version=version("sparseserve")).set(1)
        for role in Role:
            if self._layers[role]:
                ATTENDED.labels(policy.name, role.value)
                RESIDENT.labels(policy.name, role.value)
        self._decode_rows = DECODE_ROWS.labels(policy.name)
        self._dense_rows = {reason: DENSE_ROWS.labels(policy.name, reason) for reason in ("short", "prefill")}
        self._kv_bytes = {kind: KV_BYTES.labels(kind) for kind in KV_KINDS}

    def _labels(self) -> dict[str, str]:
        return {"backend": "CPU_ATTN", "runner": "V1", "isa": ops.isa()}

    def set_memory(self, memory: Memory, longest: int) -> None:
        """Take what the pages of the cache hold; `longest` is the model's longest context in tokens."""
        self._memory = StepMemory(memory)
        CAPACITY_GAIN.set(memory.row(longest).ratio)

    def count_rows(self, split: RowSplit) -> None:
        """Count the rows of a step by the path they take, and what they hold."""
        self._decode_rows.inc(split.sparse.shape[0])
        self._dense_rows["short"].inc(split.short)
        self._dense_rows["prefill"].inc(split.prefill)
        held, freed = self._memory.hold(split.before, split.after)
        PAGES_FREED.inc(freed)
        for kind, size in zip(KV_KINDS, (held.full, held.window, held.summaries, held.dense), strict=True):
            self._kv_bytes[kind].set(size)

    def count_tokens(self, step: Step) -> None:
        """Count what `attend` wrote into the step's buffers."""
        self._publish(_numbers(step))

    def _publish(self, tokens: Tensor) -> None:
        dense, selected, resident, *recall = tokens.tolist()
        for role, plans in self._layers.items():
            if not plans:
                continue
            attended = sum((dense if plan.dense_output else selected)[plan.layer] for plan in plans)
            ATTENDED.labels(self._policy, role.value).inc(attended)
            RESIDENT.labels(self._policy, role.value).inc(resident[0] * len(plans))
        for layer, child in self._recalls.items():
            child.add(recall[0][layer], recall[1][layer])


_COUNTING: WeakSet[CudaMeter] = WeakSet()  # whose numbers `snapshot` asks for


class CudaMeter(Meter):
    """Counts one engine's steps on the GPU, in tensors that captured graphs add to; no step waits for a number.

    `snapshot` reads them as they are. Without one (several API servers) `report` publishes every second what it asked
    the GPU for a second before: numbers are up to two seconds late, and those after the last step stay unpublished
    until the next one. Rows that attend to everything because they are short or in their prompt do not count.
    """

    def __init__(self, policy: Policy, plans: list[LayerPlan], layers: int, device: torch.device, runner: str) -> None:
        self._device, self._runner = device, runner
        super().__init__(policy, plans)
        numbers = 5 if policy.measure_recall else 3  # of `_numbers`
        self._counted = torch.zeros(numbers, layers, dtype=torch.float64, device=device)
        self._arrived = torch.zeros(numbers, layers, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._published = torch.zeros(numbers, layers, dtype=torch.float64)
        self._due = 0.0
        _COUNTING.add(self)

    def _labels(self) -> dict[str, str]:
        on_gpu = self._device.type == "cuda"
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(self._device)) if on_gpu else "simulator"
        return {"backend": "CUSTOM", "runner": self._runner, "isa": isa}

    def count_tokens(self, step: Step) -> None:
        self._counted += _numbers(step)

    def report(self) -> None:
        """Publish what arrived since the last time, if that is a second ago, and ask for more."""
        if monotonic() < self._due:
            return
        self._publish_up_to(self._arrived.clone())
        self._arrived.copy_(self._counted, non_blocking=True)
        self._due = monotonic() + 1

    def flush(self) -> None:
        """Publish everything; waits for the GPU."""
        self._publish_up_to(self._counted.cpu())

    def _publish_up_to(self, counted: Tensor) -> None:
        new = (counted - self._published).clamp(min=0)  # what was asked for before a flush may be older than it
        self._published = self._published + new  # not in place: steps run in inference mode, scrapes do not
        self._publish(new)


def _numbers(step: Step) -> Tensor:
    """Tokens that every layer would attend to, dense and selected, and tokens resident, [3, L] fp64.

    Where recall is measured two more: its sum over the rows, and the rows.
    """
    attended, attended_dense, resident = step.attended, step.attended_dense, step.table.seq_lens
    chosen = resident > 0  # [B]
    if step.row_budget is not None:
        chosen = chosen & (step.row_budget == 0)
        attended, attended_dense = attended * chosen[:, None], attended_dense * chosen[:, None]
        resident = resident * chosen
    dense = attended_dense.sum((1, 2), dtype=torch.float64)
    selected = attended.mean(2, dtype=torch.float64).sum(1)
    numbers = [dense, selected, resident.sum(dtype=torch.float64)]
    if step.recall is not None:
        numbers += [torch.where(chosen, step.recall, 0).sum(1, dtype=torch.float64), chosen.sum(dtype=torch.float64)]
    return torch.stack([number.expand_as(dense) for number in numbers])


Snapshot = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]


def snapshot() -> Snapshot:
    """All metrics of this process: (name, help, type, [(sample name, labels, value)])."""
    for meter in _COUNTING:
        meter.flush()
    return [
        (metric.name, metric.documentation, metric.type, [(s.name, s.labels, s.value) for s in metric.samples])
        for metric in WORKER.collect()
    ]
