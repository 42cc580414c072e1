"""vLLM's offline API with a policy that can be exchanged."""

import os
from pathlib import Path
from typing import Any

from sparseserve.config import WORKERS, to_dict
from sparseserve.policies import Policy
from sparseserve.testing.engine import rebind


class Engine:
    """An engine in a process of its own; `roomiest` is the policy whose summaries need the most room in a page."""

    def __init__(self, model: Path, roomiest: Policy, **settings: Any) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),  # vLLM would spare one
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        from vllm import LLM

        config = {"sparseserve": to_dict(roomiest)}
        settings |= {"additional_config": config, "worker_cls": WORKERS["cpu"]}
        self.llm = LLM(str(model), max_num_seqs=16, disable_log_stats=False, **settings)

    def bind(self, policy: Policy) -> None:
        """Put the engine under a policy, with nothing cached."""
        self.rebind(policy)
        self.llm.reset_prefix_cache()

    def rebind(self, policy: Policy) -> None:
        """Put the engine under a policy without summaries; what is cached stays right, prefill being vLLM's own."""
        self.llm.collective_rpc(rebind, args=(policy,))

    def answer(self, prompts: list[str]) -> list[str]:
        """Greedy answers of up to 100 tokens."""
        from vllm import SamplingParams

        outputs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def metric(self, name: str) -> float:
        """The sum of a vLLM metric."""
        from vllm.v1.metrics.reader import Counter, Gauge

        found = (metric for metric in self.llm.get_metrics() if metric.name == name)
        return float(sum(metric.value for metric in found if isinstance(metric, Counter | Gauge)))
