"""What the kernel path counts of a worker's steps."""

from __future__ import annotations

from importlib.metadata import version
from time import monotonic
from weakref import WeakSet

import torch
from torch import Tensor

from sparseserve import ops
from sparseserve.footprint.stores import Memory, StepFootprint
from sparseserve.plugin.backends.rows import RowSplit
from sparseserve.plugin.watch import metrics
from sparseserve.plugin.watch.recall import Recall
from sparseserve.policies import Policy
from sparseserve.types import LayerPlan, Role, Step

DENSE_REASONS = ("short", "prefill", "request", "guard")


class Meter:
    """Counts one engine's steps on the CPU."""

    def __init__(self, policy: Policy, plans: list[LayerPlan], recall: Recall | None = None, rank: int = 0) -> None:
        self._policy, self._recall = policy.name, recall
        self._counts_rows = rank == 0  # all ranks of an engine see the same rows, and free the same pages
        self._layers = {role: [plan for plan in plans if plan.role is role] for role in Role}
        metrics.INFO.labels(**self._labels(), policy=policy.name, version=version("sparseserve")).set(1)
        for role in Role:
            if self._layers[role]:
                metrics.ATTENDED.labels(policy.name, role.value)
                metrics.RESIDENT.labels(policy.name, role.value)
        self._decode_rows = metrics.DECODE_ROWS.labels(policy.name)
        self._dense_rows = {reason: metrics.DENSE_ROWS.labels(policy.name, reason) for reason in DENSE_REASONS}
        self._kv_bytes = {kind: metrics.KV_BYTES.labels(kind) for kind in metrics.KV_KINDS}

    def _labels(self) -> dict[str, str]:
        return {"backend": "CPU_ATTN", "runner": "V1", "isa": ops.isa()}

    def set_memory(self, memory: Memory, longest: int) -> None:
        """Take what the pages of the cache hold; `longest` is the model's longest context in tokens."""
        self._memory = StepFootprint(memory)
        metrics.CAPACITY_GAIN.set(memory.row(longest).ratio)

    def count_rows(self, split: RowSplit, asked: int = 0) -> None:
        """Count the rows of a step by the path they take, and what they hold; `asked` requests want dense attention."""
        held, freed = self._memory.hold(split.before, split.after)
        if self._counts_rows:
            self._decode_rows.inc(split.sparse.shape[0])
            self._dense_rows["short"].inc(split.short)
            self._dense_rows["prefill"].inc(split.prefill)
            self._dense_rows["request"].inc(asked)
            self._dense_rows["guard"].inc(int(split.asked.sum()) - asked)
            metrics.PAGES_FREED.inc(freed)
        for kind, size in zip(metrics.KV_KINDS, (held.full, held.window, held.page_state, held.dense), strict=True):
            self._kv_bytes[kind].set(size)

    def count_tokens(self, step: Step) -> None:
        """Count what `attend` wrote into the step's buffers."""
        self._publish(_numbers(step))
        if self._recall is not None and step.measurement is not None:
            self._recall.observe(step.measurement)

    def _publish(self, tokens: Tensor) -> None:
        dense, selected, resident = tokens.tolist()
        for role, plans in self._layers.items():
            if not plans:
                continue
            attended = sum((dense if plan.dense_output else selected)[plan.layer] for plan in plans)
            metrics.ATTENDED.labels(self._policy, role.value).inc(attended)
            metrics.RESIDENT.labels(self._policy, role.value).inc(resident[0] * len(plans))


COUNTING: WeakSet[CudaMeter] = WeakSet()  # whose numbers `snapshot` asks for


class CudaMeter(Meter):
    """Counts one engine's steps on the GPU, in tensors that captured graphs add to; no step waits for a number.

    `snapshot` reads them as they are. Without one (several API servers) `report` publishes every second what it asked
    the GPU for a second before: numbers are up to two seconds late, and those after the last step stay unpublished
    until the next one. Rows that attend to everything because they are short or in their prompt do not count.
    """

    def __init__(
        self, policy: Policy, plans: list[LayerPlan], layers: int, device: torch.device, runner: str, rank: int
    ) -> None:
        self._device, self._runner = device, runner
        super().__init__(policy, plans, rank=rank)
        self._counted = torch.zeros(3, layers, dtype=torch.float64, device=device)
        self._arrived = torch.zeros(3, layers, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._published = torch.zeros(3, layers, dtype=torch.float64)
        self._due = 0.0
        COUNTING.add(self)

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
    """Tokens that every layer would attend to, dense and selected, and tokens resident, [3, L] fp64."""
    attended, attended_dense, resident = step.attended, step.attended_dense, step.table.seq_lens
    chosen = resident > 0  # [B]
    if step.row_budget is not None:
        chosen = chosen & (step.row_budget < resident)
        attended, attended_dense = attended * chosen[:, None], attended_dense * chosen[:, None]
        resident = resident * chosen
    dense = attended_dense.sum((1, 2), dtype=torch.float64)
    selected = attended.mean(2, dtype=torch.float64).sum(1)
    return torch.stack([dense, selected, resident.sum(dtype=torch.float64).expand_as(dense)])


Snapshot = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]


def snapshot() -> Snapshot:
    """All metrics of this process: (name, help, type, [(sample name, labels, value)])."""
    for meter in COUNTING:
        meter.flush()
    return [
        (metric.name, metric.documentation, metric.type, [(s.name, s.labels, s.value) for s in metric.samples])
        for metric in metrics.WORKER.collect()
    ]
