"""vLLM's worker on CUDA, with ours before it."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from sparseserve.plugin.worker import SparseWorker


class SparseCUDAWorker(SparseWorker, Worker):
    """`--worker-cls` on CUDA."""
