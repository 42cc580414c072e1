"""vLLM's workers, which know what their requests asked for (`--worker-cls`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from sparseserve.plugin.requests import Requests
from sparseserve.plugin.self_check import check_worker_attention
from sparseserve.plugin.settings import policy_of
from sparseserve.plugin.stats import Snapshot, snapshot


class SparseWorker:
    """Comes before vLLM's own class among the bases."""

    _requests: Requests | None = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        if (policy := policy_of(self.vllm_config)) is None:
            return
        self._requests = Requests(policy, self.model_runner)
        for groups in self.model_runner.attn_groups:
            for builder in (builder for group in groups for builder in group.metadata_builders):
                if hasattr(builder, "serve"):  # groups of heads compute nothing
                    builder.serve(self._requests)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up, then check the policy's attention before any request is taken."""
        times = super().compile_or_warm_up_model()
        check_worker_attention(self)
        return times

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._requests is not None:
            self._requests.update(scheduler_output)
        return super().execute_model(scheduler_output)

    def sparseserve_stats(self) -> Snapshot:
        """The worker's metrics."""
        return snapshot()

    def sparseserve_outcome(self, request: str) -> dict[str, Any] | None:
        """What became of a request, by the X-Request-Id it came with."""
        return None if self._requests is None else self._requests.outcome(request)


class SparseCPUWorker(SparseWorker, CPUWorker):
    """On the CPU."""


class SparseCUDAWorker(SparseWorker, Worker):
    """On CUDA."""
