"""An engine in one process, step by step: what its metrics say and what vLLM's pool holds. JSON on stdin and stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(asked: dict[str, Any]) -> list[list[dict[str, float]]]:
    """The numbers after every step of every run of `asked["runs"]` (prompts of token ids), and those before any step.

    `ended` counts the requests that the step ended, `held` the blocks that the pool then holds.
    """
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams

    from sparseserve.plugin.stats import KV_KINDS, WORKER

    config = {"sparseserve": asked["policy"]}
    engine: Any = LLM(asked["model"], additional_config=config, enforce_eager=True, **asked["engine"]).llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def numbers(ended: int) -> dict[str, float]:
        names = {"freed": "sparseserve_kv_pages_freed_total", "gain": "sparseserve_kv_capacity_gain"}
        said = {key: WORKER.get_sample_value(name) for key, name in names.items()}
        said |= {kind: WORKER.get_sample_value("sparseserve_kv_bytes", {"kind": kind}) for kind in KV_KINDS}
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return {"ended": ended, "held": held} | {key: float(value) for key, value in said.items()}

    runs = [[numbers(0)]]
    for number, prompts in enumerate(asked["runs"]):
        for row, ids in enumerate(prompts):
            sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
            engine.add_request(f"{number}.{row}", {"prompt_token_ids": ids}, sampling)
        steps = []
        while engine.has_unfinished_requests():
            steps.append(numbers(sum(output.finished for output in engine.step())))
        runs.append(steps)
    return runs


if __name__ == "__main__":
    asked, out = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is not the answer
    os.write(out, json.dumps(main(asked)).encode())
