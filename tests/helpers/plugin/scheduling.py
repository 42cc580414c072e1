"""vLLM's scheduler over groups of pages, and a worker that computes nothing but knows which token is where."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from sparseserve.footprint.groups import HeadWindow
from sparseserve.plugin.head_memory import manager
from sparseserve.plugin.head_memory.manager import SinkWindowSpec
from tests.helpers.plugin.cuda_worker import vllm_config

PAGE, MAX_LEN, ROWS = 4, 96, 4
Windows = Sequence[HeadWindow | None]

manager.register()
init_none_hash(sha256)


def spec(window: HeadWindow | None, part: int) -> FullAttentionSpec | SinkWindowSpec:
    """Of pages of one head."""
    page: dict[str, Any] = {"block_size": PAGE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    if window is None:
        return FullAttentionSpec(**page)
    return SinkWindowSpec(**page, sliding_window=window.pages(MAX_LEN, PAGE) * PAGE, window=window, part=part)


def cache_config(windows: Windows, blocks: int) -> KVCacheConfig:
    """A pool of `blocks` blocks, vLLM's null block among them, for a group of each window."""
    groups = [KVCacheGroupSpec([f"group{part}"], spec(window, part)) for part, window in enumerate(windows)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def page_manager(windows: Windows, blocks: int = 200, in_flight: int = MAX_LEN, caching: bool = True) -> KVCacheManager:
    """vLLM's manager of the pages of all groups."""
    return KVCacheManager(cache_config(windows, blocks), MAX_LEN, PAGE, PAGE, in_flight, enable_caching=caching)


def request(name: str, prompt: Sequence[int], answer: int = 1) -> Request:
    """For `answer` tokens."""
    hasher = get_request_block_hasher(PAGE, sha256)
    return Request(name, [*prompt], SamplingParams(max_tokens=answer, ignore_eos=True), None, block_hasher=hasher)


def blocks_of(manager: KVCacheManager, name: str) -> list[list[KVCacheBlock]]:
    """The blocks of every group that a request holds; the null block where it holds none."""
    return [single.req_to_blocks.get(name, []) for single in manager.coordinator.single_type_managers]


def held(blocks: Sequence[KVCacheBlock]) -> set[int]:
    """Pages that are there."""
    return {page for page, block in enumerate(blocks) if not block.is_null}


def needed(window: HeadWindow | None, processed: int, computed: int) -> set[int]:
    """Pages of a row of `computed` tokens, of which the first `processed` were there before the latest step."""
    pages = set(range(-(-computed // PAGE)))
    return pages if window is None else pages - set(range(window.sink_pages(PAGE), window.start(processed + 1) // PAGE))


class Server:
    """A scheduler and its worker; `budget` tokens a step.

    With `ahead` the scheduler plans a step before it knows what the one before sampled (`--async-scheduling`).
    """

    def __init__(self, windows: Windows, spare: int, budget: int, caching: bool, ahead: bool) -> None:
        """`spare` blocks more than one row of the longest length needs."""
        self.windows, config = windows, _config(budget, caching, ahead)
        specs = [spec(window, part) for part, window in enumerate(windows)]
        least = sum(-(-each.max_memory_usage_bytes(config) // each.page_size_bytes) for each in specs)
        self.blocks = config.cache_config.num_gpu_blocks = least + spare + 1
        structured = StructuredOutputManager(config)
        kind = AsyncScheduler if ahead else Scheduler
        self.scheduler = kind(config, cache_config(windows, self.blocks), structured, PAGE)
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.worker = Worker(windows, self.blocks)

        self.processed: dict[str, int] = {}  # tokens of a row that were through when its latest step was planned
        self._ahead, self._steps = int(ahead), deque[tuple[SchedulerOutput, ModelRunnerOutput]]()

    def step(self) -> None:
        """Plan a step, compute it, and tell the scheduler of the latest that it may know of."""
        output = self.scheduler.schedule()
        rows = {name: self.scheduler.requests[name] for name in output.num_scheduled_tokens}
        self.processed |= {name: row.num_computed_tokens - row.num_in_flight_tokens for name, row in rows.items()}
        sampled = self.worker.compute(output, rows)
        order = {name: index for index, name in enumerate(rows)}
        self._steps.append((output, ModelRunnerOutput([*rows], order, [sampled[name] for name in rows])))
        while len(self._steps) > (self._ahead if rows else 0):
            planned, result = self._steps.popleft()
            self.worker.told(result)
            self.scheduler.update_from_output(planned, result)


def _config(budget: int, caching: bool, ahead: bool) -> VllmConfig:
    config = _small_config()
    config.scheduler_config.max_num_batched_tokens = budget
    config.scheduler_config.async_scheduling = ahead
    config.cache_config.enable_prefix_caching = caching
    return config


@cache
def _small_config() -> VllmConfig:
    with TemporaryDirectory() as folder:
        config = vllm_config(Path(folder))
    config.scheduler_config.max_num_seqs = ROWS
    config.model_config.max_model_len = MAX_LEN
    config.cache_config.block_size = PAGE
    return config


class Worker:
    """Keeps page tables as vLLM's worker does, from what the scheduler sends.

    A token is known by itself and all tokens before it, as its keys and values depend on them.
    """

    def __init__(self, windows: Windows, blocks: int) -> None:
        self.windows = windows
        self.tables: dict[str, list[list[int]]] = {}  # of every group
        self.before: dict[str, int] = {}  # tokens before a row's latest step
        self.sampled: dict[str, list[int]] = {}  # tokens that the scheduler has not been told of
        self.content = np.zeros((len(windows), blocks, PAGE), dtype=np.int64)  # what a group last wrote there
        self.owner = np.full(blocks, -1)  # the group that wrote to a block last

    def compute(self, output: SchedulerOutput, rows: dict[str, Request]) -> dict[str, list[int]]:
        """Write the tokens of a step, check that all which they may attend to are there, and sample the next ones."""
        self._take(output)
        tokens = {name: known([*row.all_token_ids, *self.sampled.get(name, [])]) for name, row in rows.items()}
        for name, count in output.num_scheduled_tokens.items():
            self._write(name, np.arange(self.before[name], self.before[name] + count), tokens[name])
        for name, count in output.num_scheduled_tokens.items():
            self._read(name, count, tokens[name])
        return {name: self._sample(name, row.num_computed_tokens, tokens[name]) for name, row in rows.items()}

    def told(self, result: ModelRunnerOutput) -> None:
        """The scheduler learns what a step sampled."""
        for name, tokens in zip(result.req_ids, result.sampled_token_ids, strict=True):
            del self.sampled[name][: len(tokens)]

    def _sample(self, name: str, computed: int, tokens: np.ndarray) -> list[int]:
        """The next token, if all before are computed; rows of the same tokens go on in the same way."""
        new = [int(tokens[-1] % 7)] if computed == len(tokens) else []
        self.sampled.setdefault(name, []).extend(new)
        return new

    def _take(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [[*ids] for ids in new.block_ids]
            self.before[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, new_ids, before in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            self.before[name] = before
            if name in cached.resumed_req_ids:
                self.tables[name] = [[] for _ in self.windows]
            for table, ids in zip(self.tables[name], new_ids or [[] for _ in self.windows], strict=True):
                table += ids

    def _write(self, name: str, positions: np.ndarray, tokens: np.ndarray) -> None:
        for group, table in enumerate(self.tables[name]):
            blocks = np.array(table)[positions // PAGE]
            assert blocks.all(), f"{name} writes to the null block"
            self.content[group, blocks, positions % PAGE] = tokens[positions]
            self.owner[blocks] = group

    def _read(self, name: str, count: int, tokens: np.ndarray) -> None:
        before = self.before[name]
        for group, (window, table) in enumerate(zip(self.windows, self.tables[name], strict=True)):
            sink, start = (0, 0) if window is None else (window.sink, window.start(before + 1))
            end = before + count
            positions = np.array([*range(min(sink, start)), *range(start, end)])
            blocks = np.array(table)[positions // PAGE]
            there = (self.content[group, blocks, positions % PAGE] == tokens[positions]) & (self.owner[blocks] == group)
            assert there.all(), f"{name}, group {group}: {positions[~there].tolist()} are gone at {before} + {count}"


def known(tokens: Sequence[int]) -> np.ndarray:
    """What tokens [T] int64 are known by."""
    names, last = [], 0
    for token in tokens:
        last = hash((last, token))
        names.append(last)
    return np.array(names, dtype=np.int64)
