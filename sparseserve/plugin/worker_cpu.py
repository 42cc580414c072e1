"""vLLM's worker on the CPU, with ours before it."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from sparseserve.plugin.worker import SparseWorker


class SparseCPUWorker(SparseWorker, CPUWorker):
    """`--worker-cls` on the CPU."""
