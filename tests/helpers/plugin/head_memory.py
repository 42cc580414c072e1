"""An engine under one policy, with poison in freed pages: what it answers and what its pool holds."""

from __future__ import annotations

import os
from typing import Any

from tests.helpers.plugin.one_process import answer, start


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Run batches of prompts (token ids), each with an empty prefix cache unless it is to `keep` what is there."""
    os.environ |= {"SPARSESERVE_POISON_FREED_PAGES": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    llm = start(asked)
    from vllm import SamplingParams

    core: Any = llm.llm_engine.engine_core
    pool = core.engine_core.scheduler.kv_cache_manager.block_pool

    def total(name: str) -> float:
        return float(sum(metric.value for metric in llm.get_metrics() if metric.name == name))

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
    answer(main)
