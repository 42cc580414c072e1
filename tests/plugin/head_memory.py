"""An engine under one policy in one process, with poison in freed pages: JSON on stdin, JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Run batches of prompts (token ids), each with an empty prefix cache unless it is to `keep` what is there."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "SPARSESERVE_POISON_FREED_PAGES": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    config = {"sparseserve": asked["policy"]}
    llm = LLM(asked["model"], additional_config=config, disable_log_stats=False, enforce_eager=True, **asked["engine"])
    core: Any = llm.llm_engine.engine_core
    pool = core.engine_core.scheduler.kv_cache_manager.block_pool

    def total(name: str) -> float:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == name)  # type: ignore[union-attr]

    free, runs = pool.get_num_free_blocks(), []
    for run in asked["runs"]:
        if not run["keep"]:
            llm.reset_prefix_cache()
        before = total("vllm:prefix_cache_hits"), total("vllm:num_preemptions")
        sampling = SamplingParams(temperature=0, max_tokens=run["tokens"], ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in run["prompts"]], sampling, use_tqdm=False)
        runs.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "hits": total("vllm:prefix_cache_hits") - before[0],
                "preemptions": total("vllm:num_preemptions") - before[1],
                "missing_blocks": free - pool.get_num_free_blocks(),
            }
        )
    return {"runs": runs, "blocks": free}


if __name__ == "__main__":
    asked, out = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is not the answer
    os.write(out, json.dumps(main(asked)).encode())
