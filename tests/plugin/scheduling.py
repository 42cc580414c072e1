"""vLLM's scheduler over groups of pages, and a worker that computes nothing but knows which token is where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cuda_worker import vllm_config
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from sparseserve.plugin import window_cache
from sparseserve.plugin.window_cache import SinkWindowSpec
from sparseserve.storage import Span

PAGE, MAX_LEN, ROWS = 4, 96, 4
Spans = Sequence[Span | None]

window_cache.register()
init_none_hash(sha256)


def spec(span: Span | None, part: int) -> FullAttentionSpec | SinkWindowSpec:
    """Of pages of one head."""
    page: dict[str, Any] = {"block_size": PAGE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    if span is None:
        return FullAttentionSpec(**page)
    return SinkWindowSpec(**page, sliding_window=span.pages(MAX_LEN, PAGE) * PAGE, span=span, part=part)


def cache_config(spans: Spans, blocks: int) -> KVCacheConfig:
    """A pool of `blocks` blocks, vLLM's null block among them, for a group of each span."""
    groups = [KVCacheGroupSpec([f"group{part}"], spec(span, part)) for part, span in enumerate(spans)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def cache(spans: Spans, blocks: int = 200, in_flight: int = MAX_LEN, caching: bool = True) -> KVCacheManager:
    """vLLM's manager of the pages of all groups."""
    return KVCacheManager(cache_config(spans, blocks), MAX_LEN, PAGE, PAGE, in_flight, enable_caching=caching)


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


def needed(span: Span | None, processed: int, computed: int) -> set[int]:
    """Pages of a row of `computed` tokens, of which the first `processed` were there before the latest step."""
    pages = set(range(-(-computed // PAGE)))
    return pages if span is None else pages - set(range(span.sink_pages(PAGE), span.start(processed + 1) // PAGE))


class Server:
    """A scheduler and its worker; `budget` tokens a step."""

    def __init__(self, spans: Spans, spare: int, budget: int, caching: bool) -> None:
        """`spare` blocks more than one row of the longest length needs."""
        self.spans, config = spans, _config(budget, caching)
        specs = [spec(span, part) for part, span in enumerate(spans)]
        least = sum(-(-each.max_memory_usage_bytes(config) // each.page_size_bytes) for each in specs)
        self.blocks = config.cache_config.num_gpu_blocks = least + spare + 1
        structured = StructuredOutputManager(config)
        self.scheduler = Scheduler(config, cache_config(spans, self.blocks), structured, PAGE)
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.worker = Worker(spans, self.blocks)

    def step(self) -> None:
        """Schedule, compute, and give every row that is through with its tokens the next one."""
        output = self.scheduler.schedule()
        names = [*output.num_scheduled_tokens]
        requests = self.scheduler.requests
        self.worker.compute(output, {name: requests[name] for name in names})
        sampled = [self.worker.sample(requests[name]) for name in names]
        order = {name: row for row, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, order, sampled))


def _config(budget: int, caching: bool) -> VllmConfig:
    _CONFIG.scheduler_config.max_num_batched_tokens = budget
    _CONFIG.cache_config.enable_prefix_caching = caching
    return _CONFIG


def _made_config() -> VllmConfig:
    with TemporaryDirectory() as folder:
        config = vllm_config(Path(folder))
    config.scheduler_config.async_scheduling = False
    config.scheduler_config.max_num_seqs = ROWS
    config.model_config.max_model_len = MAX_LEN
    config.cache_config.block_size = PAGE
    return config


_CONFIG = _made_config()


class Worker:
    """Keeps page tables as vLLM's worker does, from what the scheduler sends.

    A token is known by itself and all tokens before it, as its keys and values depend on them.
    """

    def __init__(self, spans: Spans, blocks: int) -> None:
        self.spans = spans
        self.tables: dict[str, list[list[int]]] = {}  # of every group
        self.processed: dict[str, int] = {}  # tokens before a row's latest step
        self.content = np.zeros((len(spans), blocks, PAGE), dtype=np.int64)  # what a group last wrote there
        self.owner = np.full(blocks, -1)  # the group that wrote to a block last

    def compute(self, output: SchedulerOutput, requests: dict[str, Request]) -> None:
        """Write the tokens of a step, then check that all which they may attend to are there."""
        self._take(output)
        tokens = {name: known(request) for name, request in requests.items()}
        for name, count in output.num_scheduled_tokens.items():
            self._write(name, np.arange(self.processed[name], self.processed[name] + count), tokens[name])
        for name, count in output.num_scheduled_tokens.items():
            self._read(name, count, tokens[name])

    @staticmethod
    def sample(request: Request) -> list[int]:
        """The next token, if all before are computed; rows of the same tokens go on in the same way."""
        return [int(known(request)[-1] % 7)] if request.num_computed_tokens == request.num_tokens else []

    def _take(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id], self.processed[new.req_id] = (
                [[*ids] for ids in new.block_ids],
                new.num_computed_tokens,
            )
        cached = output.scheduled_cached_reqs
        for name, new_ids, processed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            self.processed[name] = processed
            if name in cached.resumed_req_ids:
                self.tables[name] = [[] for _ in self.spans]
            for table, ids in zip(self.tables[name], new_ids or [[] for _ in self.spans], strict=True):
                table += ids

    def _write(self, name: str, positions: np.ndarray, tokens: np.ndarray) -> None:
        for group, table in enumerate(self.tables[name]):
            blocks = np.array(table)[positions // PAGE]
            assert blocks.all(), f"{name} writes to the null block"
            self.content[group, blocks, positions % PAGE] = tokens[positions]
            self.owner[blocks] = group

    def _read(self, name: str, count: int, tokens: np.ndarray) -> None:
        processed = self.processed[name]
        for group, (span, table) in enumerate(zip(self.spans, self.tables[name], strict=True)):
            sink, start = (0, 0) if span is None else (span.sink, span.start(processed + 1))
            end = processed + count
            positions = np.array([*range(min(sink, start)), *range(start, end)])
            blocks = np.array(table)[positions // PAGE]
            there = (self.content[group, blocks, positions % PAGE] == tokens[positions]) & (self.owner[blocks] == group)
            assert there.all(), f"{name}, group {group}: {positions[~there].tolist()} are gone at {processed} + {count}"


def known(request: Request) -> np.ndarray:
    """What the tokens of a request [T] int64 are known by."""
    names, last = [], 0
    for token in request.all_token_ids:
        last = hash((last, token))
        names.append(last)
    return np.array(names, dtype=np.int64)
