"""What the metrics say of memory is what vLLM's pool of pages holds, step by step."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from sparseserve.demo import circuits
from sparseserve.footprint.groups import HeadWindow
from sparseserve.footprint.planned import plan_model
from sparseserve.footprint.stores import Memory
from sparseserve.model import ModelShape
from sparseserve.plugin.backends.rows import RowSplit
from sparseserve.plugin.watch.meter import Meter, snapshot
from sparseserve.plugin.watch.metrics import KV_KINDS
from sparseserve.policies import Policy, Quest, Retrieval, Streaming
from sparseserve.questions.needles import ask
from sparseserve.server.views.metrics import WorkerMetrics
from sparseserve.testing.plans import write_head_map
from sparseserve.types import HeadShape
from tests.helpers.plugin import one_process
from tests.helpers.plugin.worker_metrics import value

PAGE, LONGEST, BLOCKS, CHUNK, ANSWER = 64, 2048, 500, 256, 70
HEADS = HeadShape(circuits.KV_HEADS, circuits.GROUP, circuits.HEAD_DIM)
SHAPE = ModelShape("demo", circuits.LAYERS, HEADS, LONGEST, PAGE)
SCRIPT = "tests.helpers.plugin.memory_metrics"
SHORT = {"policy": "streaming", "reason": "short"}


def test_an_engine_tells_what_its_pool_holds(model: Path, tmp_path: Path) -> None:
    heads = write_head_map(tmp_path / "heads.json", set(circuits.retrieval_heads()))
    policy = Retrieval(artifact=heads, sink_tokens=64, recent_tokens=192, min_tokens=0)
    memory = plan_model(policy, SHAPE, element_bytes=2).memory(0)
    prompts = [list(ask(length, 0.5, length).prompt.encode()) for length in (500, 900)]
    runs, log = stepped(model, policy, [prompts, [prompts[1]]])

    tokens, dense = memory.capacity(BLOCKS - 1, LONGEST)
    line = f"sparseserve: KV cache for {tokens:,} tokens at 2,048 per request, dense {dense:,}"
    assert re.search(re.escape(line), log)
    (start,), together, again = runs
    assert start["gain"] == pytest.approx(memory.row(LONGEST).ratio)
    for step in [*together, *again]:
        if not step["ended"]:  # or the pool no longer holds what the step did
            assert (step["full"] + step["window"], step["summaries"]) == (step["held"] * memory.page_bytes, 0)
    lengths = [len(prompt) + ANSWER - 1 for prompt in prompts]  # the last token is never written
    assert together[-1]["dense_equivalent"] == -(-lengths[1] // PAGE) * memory.dense_bytes
    assert together[-1]["freed"] - start["freed"] == sum(freed(memory, length + 1) for length in lengths)
    hit = len(prompts[1]) // PAGE * PAGE
    assert len(again) < len(together)  # the prompt's pages were found
    assert again[-1]["freed"] - together[-1]["freed"] == freed(memory, lengths[1] + 1) - freed(memory, hit + 1)


def freed(memory: Memory, length: int) -> int:
    """Pages that the token of this position does not need, in all page tables."""
    return sum(group.tables * group.window.freed_pages(length, PAGE) for group in memory.groups if group.window)


def stepped(model: Path, policy: Policy, runs: list[list[list[int]]]) -> tuple[list[list[dict[str, float]]], str]:
    """The script's numbers, and what the engine logged."""
    engine: dict[str, Any] = {
        "max_model_len": LONGEST,
        "block_size": PAGE,
        "num_gpu_blocks_override": BLOCKS,
        "max_num_batched_tokens": CHUNK,
        "async_scheduling": False,
    }
    return one_process.ask(SCRIPT, model, policy, engine, tokens=ANSWER, runs=runs)


def counted(policy: Policy, before: list[int], after: list[int]) -> tuple[dict[str, float], float, float]:
    """Bytes by kind, pages freed and the gain, of a step."""
    plans = policy.plans(SHAPE)
    meter = Meter(policy, list(plans))
    meter.set_memory(plan_model(policy, SHAPE, element_bytes=2).memory(0), LONGEST)
    gone = value("sparseserve_kv_pages_freed_total")
    lengths = [torch.tensor(tokens, dtype=torch.int32) for tokens in (before, after)]
    meter.count_rows(RowSplit(torch.empty(0), torch.empty(len(before)), 0, torch.zeros(len(before)).bool(), *lengths))
    kinds = {kind: value("sparseserve_kv_bytes", kind=kind) for kind in KV_KINDS}
    return kinds, value("sparseserve_kv_pages_freed_total") - gone, value("sparseserve_kv_capacity_gain")


def test_shared_pages_hold_everything_and_free_nothing() -> None:
    dense = 24 * PAGE * 2 * 64 * 2
    kinds, gone, gain = counted(Quest(), [0, 100, 1999], [64, 101, 2000])
    assert kinds == {"full": 35 * dense, "window": 0, "summaries": 35 * dense / 32, "dense_equivalent": 35 * dense}
    assert gone == 0 and gain == pytest.approx(32 / 33)


def test_rows_and_what_they_free_are_counted_on_one_rank() -> None:
    policy = Streaming(sink_tokens=4, recent_tokens=252, min_tokens=0)
    plans, samples = policy.plans(SHAPE), ("sparseserve_dense_rows_total", "sparseserve_kv_pages_freed_total")
    meters = [Meter(policy, [*plans], rank=rank) for rank in (0, 1)]
    before = value(samples[0], **SHORT), value(samples[1])
    lengths = torch.tensor([1, 379], dtype=torch.int32)  # the second row's window leaves a page behind
    rows = RowSplit(torch.empty(0), torch.empty(2), 2, torch.zeros(2).bool(), lengths - 1, lengths)
    for meter in meters:
        meter.set_memory(plan_model(policy, SHAPE, element_bytes=2).memory(0), LONGEST)
        meter.count_rows(rows)
    assert (value(samples[0], **SHORT), value(samples[1])) == (before[0] + 2, before[1] + 1)


class TwoWorkers:
    """An engine of which two ranks say the same."""

    async def collective_rpc(self, name: str) -> list[Any]:
        return [snapshot(), snapshot()]


def test_bytes_of_ranks_add_up_and_the_gain_is_one() -> None:
    kinds, _, gain = counted(Streaming(), [4999], [5000])
    metrics = WorkerMetrics()
    asyncio.run(metrics.refresh(cast(Any, TwoWorkers())))  # is asked for nothing else
    samples = {(s.name, s.labels.get("kind")): s.value for metric in metrics.collect() for s in metric.samples}
    assert samples["sparseserve_kv_bytes", "window"] == 2 * kinds["window"] > 0
    assert samples["sparseserve_kv_capacity_gain", None] == gain


def test_windows_hold_less_and_say_what_left_them() -> None:
    dense = 24 * PAGE * 2 * 64 * 2
    policy = Streaming(sink_tokens=4, recent_tokens=252, min_tokens=0)
    kinds, gone, gain = counted(policy, [256, 1023], [512, 1024])
    window = HeadWindow(4, 252, 0.0, 0, 256)
    assert kinds["full"] == kinds["summaries"] == 0
    assert kinds["window"] == (8 + 16 - window.freed_pages(1024, PAGE)) * dense
    assert kinds["dense_equivalent"] == 24 * dense
    assert (
        gone == window.freed_pages(513, PAGE) + window.freed_pages(1025, PAGE) - window.freed_pages(1024, PAGE) == 3 + 0
    )
    assert gain == pytest.approx(32 / 5)
