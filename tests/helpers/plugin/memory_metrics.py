"""An engine, step by step: what its metrics say and what vLLM's pool holds."""

from __future__ import annotations

from typing import Any

from tests.helpers.plugin.one_process import answer, start


def main(asked: dict[str, Any]) -> list[list[dict[str, float]]]:
    """The numbers after every step of every run of `asked["runs"]` (prompts of token ids), and those before any step.

    `ended` counts the requests that the step ended, `held` the blocks that the pool then holds.
    """
    engine = start(asked).llm_engine
    from vllm import SamplingParams

    from sparseserve.plugin.watch.metrics import KV_KINDS
    from tests.helpers.plugin.worker_metrics import value

    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def numbers(ended: int) -> dict[str, float]:
        said = {"freed": value("sparseserve_kv_pages_freed_total"), "gain": value("sparseserve_kv_capacity_gain")}
        said |= {kind: value("sparseserve_kv_bytes", kind=kind) for kind in KV_KINDS}
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return {"ended": ended, "held": held} | said

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
    answer(main)
