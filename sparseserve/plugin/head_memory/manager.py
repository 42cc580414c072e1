"""The pages of heads that keep a window: vLLM's spec and manager of a group that frees what lies before it.

Both live in the scheduler's process and know pages by their numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sparseserve.footprint.groups import HeadWindow
from sparseserve.plugin.head_memory import poison


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """Pages that hold the sink or the last tokens of a row; `sliding_window` are the tokens that the longest keeps."""

    window: HeadWindow
    part: int  # groups of the same window have their own pages

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Pages that a row holds at most: those it keeps, and those of tokens that are being computed."""
        longest = -(-max_model_len // self.block_size)
        kept = max(
            self.window.pages(length, self.block_size)
            for length in (min(self.window.dense_up_to, max_model_len), max_model_len)
        )
        return min(longest, kept + -(-max_in_flight_tokens // self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether the layers can share a page table."""
        return all(
            isinstance(spec, SinkWindowSpec) and (spec.window, spec.part) == (self.window, self.part)
            for spec in kv_cache_specs.values()
        )


class SinkWindowManager(SingleTypeKVCacheManager):
    """Frees the pages between the sink and the window; a prefix is found where sink and window are."""

    kv_cache_spec: SinkWindowSpec

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the token after the first `processed_computed_tokens` no longer needs."""
        window = self.kv_cache_spec.window
        first = window.sink_pages(self.block_size)
        end = window.start(processed_computed_tokens + 1) // self.block_size
        if not poison.ENABLED:
            self._remove_blocks_in_range(request_id, first, end)
            return
        held = [block for block in self.req_to_blocks.get(request_id, [])[first:end] if not block.is_null]
        self._remove_blocks_in_range(request_id, first, end)
        poison.freed(self.block_pool, held)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of which the sink's pages and those of the next token's window are cached."""
        assert isinstance(kv_cache_spec, SinkWindowSpec) and not drop_eagle_block
        size, window = kv_cache_spec.block_size, kv_cache_spec.window
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        cached = [block_pool.get_cached_block(hashes[i], kv_cache_group_ids) for i in range(max_length // size)]
        missing = list(accumulate((blocks is None for blocks in cached), initial=0))  # before each page
        for end in range(len(cached), 0, -1):
            sink = min(window.sink_pages(size), end)
            start = max(sink, min(end, window.start(end * size + 1) // size))
            if end * size % alignment_tokens == 0 and missing[sink] == 0 and missing[start] == missing[end]:
                kept = [*cached[:sink], *[None] * (start - sink), *cached[start:end]]
                return _columns(kept, len(kv_cache_group_ids), block_pool.null_block), end * size
        return tuple([] for _ in kv_cache_group_ids), 0


def _columns(
    rows: Sequence[Sequence[KVCacheBlock] | None], groups: int, null: KVCacheBlock
) -> tuple[list[KVCacheBlock], ...]:
    """The blocks of every group; `null` where a row has none."""
    return tuple([null if row is None else row[group] for row in rows] for group in range(groups))


def register() -> None:
    """Tell vLLM of the manager; its own come first, or it would leave them out."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
