"""What vLLM's workers (`--worker-cls`) know of their requests.

Those of the CPU and of CUDA are apart: importing vLLM's CPU worker replaces torch.cuda's streams and events.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from sparseserve.plugin.backends.builder import SparseBuilder
from sparseserve.plugin.backends.layers import SparseImpl
from sparseserve.plugin.self_check import check_worker_attention
from sparseserve.plugin.settings import policy_of
from sparseserve.plugin.watch.meter import Snapshot, snapshot
from sparseserve.plugin.watch.requests import ServedRequests


class SparseWorker(Worker):
    """Comes before vLLM's own class among the bases; that of the CPU is a Worker, too."""

    _requests: ServedRequests | None = None

    def determine_available_memory(self) -> int:
        """As vLLM has it; then let go of the cache that it profiled with."""
        available = super().determine_available_memory()
        for layer in get_layers_from_vllm_config(self.vllm_config, Attention).values():
            if isinstance(layer.impl, SparseImpl):
                layer.impl.unbind()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return available

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if (policy := policy_of(self.vllm_config)) is None:
            return
        self._requests = ServedRequests(policy, self.model_runner)
        for groups in self.model_runner.attn_groups:
            for builder in (builder for group in groups for builder in group.metadata_builders):
                if isinstance(builder, SparseBuilder):  # groups of heads compute nothing
                    builder.serve(self._requests)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up, then check the policy's attention before any request is taken."""
        times: CompilationTimes = super().compile_or_warm_up_model()
        check_worker_attention(self)
        return times

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:  # vLLM's own is decorated, without types
        if self._requests is not None:
            self._requests.update(scheduler_output)
        return super().execute_model(scheduler_output)

    def sparseserve_stats(self) -> Snapshot:
        """The worker's metrics."""
        return snapshot()

    def sparseserve_outcome(self, request: str) -> dict[str, object] | None:
        """What became of a request, by the name that the API server gave it in X-Request-Id."""
        return None if self._requests is None else self._requests.outcome(request)
