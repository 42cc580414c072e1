"""Pages of windows in vLLM's own bookkeeping: what is freed, what a prefix finds again, what a row is counted for."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request

from sparseserve.footprint.groups import HeadWindow, Storage
from sparseserve.model import ModelShape
from sparseserve.plugin.head_memory.manager import SinkWindowSpec
from sparseserve.plugin.head_memory.pool import HeadGroups
from sparseserve.types import HeadShape
from tests.helpers.plugin.cuda_worker import vllm_config
from tests.helpers.plugin.scheduling import MAX_LEN, PAGE, blocks_of, cache_config, held, page_manager, request, spec

pytestmark = pytest.mark.vllm

SHORT, LONG = HeadWindow(sink=5, alpha=8, beta=0), HeadWindow(sink=0, alpha=4, beta=0.5)
PROMPT = [*range(41)]


def advance(manager: KVCacheManager, row: Request, tokens: int) -> bool:
    """Give a row pages for its next tokens and take them as computed, as the scheduler does; whether there were any."""
    hit, cached = manager.empty_kv_cache_blocks, 0
    if row.num_computed_tokens == 0:
        hit, cached, _ = manager.get_computed_blocks(row)
    tokens = min(tokens, row.num_tokens - cached - row.num_computed_tokens)
    if manager.allocate_slots(row, tokens, cached, hit, full_sequence_must_fit=row.num_computed_tokens == 0) is None:
        return False
    row.num_computed_tokens += cached + tokens
    return True


def computed(manager: KVCacheManager, name: str, prompt: Sequence[int], chunk: int = MAX_LEN) -> Request:
    """A row whose prompt is computed."""
    row = request(name, prompt)
    while row.num_computed_tokens < row.num_tokens:
        assert advance(manager, row, chunk)
    return row


def most_blocks(window: HeadWindow, chunk: int) -> int:
    """Blocks that a row is counted for."""
    pages = spec(window, 0)
    assert isinstance(pages, SinkWindowSpec)
    return pages.max_admission_blocks_per_request(chunk, MAX_LEN)


def test_what_is_between_sink_and_window_is_freed() -> None:
    manager = page_manager([None, SHORT])
    row = request("row", range(41))
    steps = [(12, range(3)), (9, range(6)), (3, [0, 1, 3, 4, 5]), (1, [0, 1, 4, 5, 6]), (16, [0, 1, 4, *range(5, 11)])]
    for tokens, pages in steps:
        assert advance(manager, row, tokens)
        full, window = blocks_of(manager, "row")
        assert held(full) == {*range(-(-row.num_computed_tokens // PAGE))}
        assert held(window) == {*pages}


@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_chunks_of_any_size_leave_the_same_pages(chunk: int) -> None:
    manager = page_manager([None, SHORT, LONG])
    row = computed(manager, "row", range(80), chunk)
    row.append_output_token_ids(7)
    assert advance(manager, row, 1)
    full, short, long = map(held, blocks_of(manager, "row"))  # of 81 tokens: [73, 81) and [37, 81)
    assert full == {*range(21)} and short == {0, 1, 18, 19, 20} and long == {*range(9, 21)}


def test_short_rows_keep_everything() -> None:
    manager = page_manager([replace(SHORT, dense_up_to=30)])
    row = computed(manager, "row", range(30), 4)
    assert held(blocks_of(manager, "row")[0]) == {*range(8)}
    row.append_output_token_ids(7)
    assert advance(manager, row, 1)
    assert held(blocks_of(manager, "row")[0]) == {0, 1, 5, 6, 7}


def test_a_prefix_has_the_sink_and_the_window_that_the_next_token_needs() -> None:
    manager = page_manager([None, SHORT, LONG])
    computed(manager, "first", PROMPT)
    first = blocks_of(manager, "first")
    hit, tokens, _ = manager.get_computed_blocks(request("second", PROMPT))
    assert tokens == 40
    assert [held(blocks) for blocks in hit.blocks] == [{*range(10)}, {0, 1, 8, 9}, {4, 5, 6, 7, 8, 9}]
    for mine, there in zip(hit.blocks, first, strict=True):
        assert len(mine) == 10 and all(mine[page] is there[page] for page in held(mine))


@pytest.mark.parametrize(
    ("group", "page", "tokens"),
    [
        (0, 0, 0),  # keys of all heads that keep everything
        (0, 6, 24),
        (1, 0, 0),  # the sink
        (1, 1, 4),
        (1, 5, 40),  # between sink and window
        (1, 8, 32),  # the window
        (1, 9, 36),
        (2, 2, 40),
        (2, 4, 16),  # every longer prefix needs the page
        (2, 9, 36),
    ],
)
def test_a_page_that_is_gone_makes_the_prefix_shorter(group: int, page: int, tokens: int) -> None:
    manager = page_manager([None, SHORT, LONG])
    computed(manager, "first", PROMPT)
    manager.evict_blocks({blocks_of(manager, "first")[group][page].block_id})
    hit, found, _ = manager.get_computed_blocks(request("second", PROMPT))
    assert found == tokens
    assert all(len(blocks) == tokens // PAGE for blocks in hit.blocks)


def test_pages_that_a_window_freed_still_serve_shorter_prefixes() -> None:
    manager = page_manager([None, SHORT])
    computed(manager, "first", range(80), 8)
    hit, tokens, _ = manager.get_computed_blocks(request("second", PROMPT))
    assert tokens == 40 and all(block.ref_cnt == 0 for block in hit.blocks[1][8:])


@pytest.mark.parametrize("windows", [[SHORT], [SHORT, LONG], [None, SHORT, SHORT]], ids=len)
def test_a_prefix_without_full_heads_or_in_two_parts(windows: list[HeadWindow | None]) -> None:
    manager = page_manager(windows)
    computed(manager, "first", PROMPT)
    assert manager.get_computed_blocks(request("second", PROMPT))[1] == 40
    last = blocks_of(manager, "first")[-1][9]
    manager.evict_blocks({last.block_id})
    assert manager.get_computed_blocks(request("third", PROMPT))[1] == 36


def test_a_prefix_that_is_used_goes_on_like_a_row_of_its_own() -> None:
    manager = page_manager([None, SHORT, LONG])
    computed(manager, "first", PROMPT)
    row = request("second", [*PROMPT[:33], *range(500, 530)])
    assert advance(manager, row, 3) and row.num_computed_tokens == 35
    assert [held(blocks) for blocks in blocks_of(manager, "second")] == [{*range(9)}, {0, 1, 6, 7, 8}, {*range(3, 9)}]
    while row.num_computed_tokens < row.num_tokens:
        assert advance(manager, row, 5)
    assert held(blocks_of(manager, "second")[1]) == {0, 1, *range(13, 16)}


@pytest.mark.parametrize("ending", ["cancelled", "preempted"])
def test_a_row_that_goes_leaves_nothing(ending: str) -> None:
    manager = page_manager([None, SHORT, LONG], caching=ending == "preempted")
    free = manager.block_pool.get_num_free_blocks()
    row = request("row", PROMPT)
    for tokens in (20, 8) if ending == "cancelled" else (41,):
        assert advance(manager, row, tokens)
    manager.free(row)
    assert manager.block_pool.get_num_free_blocks() == free
    assert all(block.ref_cnt == 0 for block in manager.block_pool.blocks[1:])
    for single in manager.coordinator.single_type_managers:
        assert not single.req_to_blocks and not single.num_cached_block


SPANS = st.builds(
    HeadWindow,
    sink=st.integers(0, 12),
    alpha=st.floats(-20, 40),
    beta=st.floats(0, 1),
    minimum=st.integers(1, 20),
    dense_up_to=st.sampled_from([0, 30, 70, MAX_LEN]),
)


@given(SPANS, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_no_row_holds_more_than_it_is_counted_for(window: HeadWindow, chunk: int) -> None:
    most = most_blocks(window, chunk)
    manager = page_manager([window], most + 1, in_flight=chunk)
    assert manager.coordinator.single_type_managers[0].max_admission_blocks_per_request == most
    row = request("row", range(MAX_LEN))
    while row.num_computed_tokens < row.num_tokens:
        assert advance(manager, row, chunk)
        assert len(held(blocks_of(manager, "row")[0])) <= most


def test_a_row_is_let_in_when_what_it_holds_at_a_time_has_room() -> None:
    most = most_blocks(SHORT, 8)
    assert most == 7 < MAX_LEN // PAGE  # two of the sink, two of the window, two of the chunk, one more
    assert not advance(page_manager([SHORT], most, in_flight=8), request("row", range(MAX_LEN)), 8)
    computed(page_manager([SHORT], most + 1, in_flight=8), "row", range(MAX_LEN), 8)


def test_specs_travel_between_processes() -> None:
    config = cache_config([None, SHORT, SHORT], 10)
    again = pickle.loads(pickle.dumps(config))
    assert again.kv_cache_groups == config.kv_cache_groups
    assert isinstance(again.kv_cache_groups[1].kv_cache_spec, SinkWindowSpec)


def test_parts_of_a_class_do_not_share_a_page_table() -> None:
    one, other = spec(SHORT, 1), spec(SHORT, 2)
    assert one.is_uniform_with_collection({"a": one, "b": one})
    assert not one.is_uniform_with_collection({"a": one, "b": other})
    assert not one.is_uniform_with_collection({"a": one, "b": spec(LONG, 1)})


STORED = {
    "full and windows": (3, 5, (None, SHORT, LONG)),
    "one window": (3, 6, (SHORT,)),
    "windows": (3, 4, (LONG, SHORT)),
    "full and parts": (2, 3, (None, SHORT, SHORT, LONG)),
    "parts": (4, 3, (SHORT, SHORT, LONG)),
    "one layer": (1, 2, (None, SHORT)),
    "one layer of windows": (1, 1, (SHORT, LONG)),
}


def specs_of(groups: HeadGroups) -> dict[str, KVCacheSpec]:
    """What the layers of a model of four heads ask vLLM for."""
    model, windows = groups.model, groups.storage.windows
    plain = FullAttentionSpec(
        block_size=model.page_size, num_kv_heads=4, head_size=model.heads.head_dim, dtype=torch.bfloat16
    )
    layers: dict[str, KVCacheSpec] = {f"layer{layer}": groups.layers_spec(plain) for layer in range(model.layers)}
    return layers | {f"group{number}": groups.group_spec(number) for number in range(1, len(windows))}


@pytest.mark.parametrize("name", STORED)
def test_vllm_makes_a_group_of_every_group(name: str, tmp_path: Path) -> None:
    layers, slots, windows = STORED[name]
    model = ModelShape("m", layers, HeadShape(4, 2, head_dim=16), max_len=448, page_size=16)
    storage = Storage(slots, windows, torch.zeros(layers, 4, 2, dtype=torch.int32))
    specs = specs_of(HeadGroups(storage, model, torch.bfloat16, rows=2, tokens=8, device=torch.device("cpu")))
    config = vllm_config(tmp_path)
    config.cache_config.kv_cache_layout = KVCacheLayout.BLHNC.name
    config.scheduler_config.max_num_batched_tokens = 32
    part = -(-slots * 32 // layers) * 2 * 16  # bytes of a layer's part of a page: 32 numbers a slot and token
    block = layers * part
    assert 0 <= block - slots * 32 * 2 * 16 < layers * 2 * 16
    longest = sum(
        28 if window is None else window.pages(448, 16) + 3 for window in windows
    )  # 2 for a chunk, 1 for its start
    with pytest.raises(ValueError, match="max seq len"):
        get_kv_cache_configs(config, [specs], [longest * block])
    (made,) = get_kv_cache_configs(config, [specs], [(longest + 1) * block])  # one is vLLM's null block

    assert made.num_blocks == longest + 1
    named = [[f"layer{layer}" for layer in range(layers)], *([f"group{n}"] for n in range(1, len(windows)))]
    assert [group.layer_names for group in made.kv_cache_groups] == named
    kinds = [group.kv_cache_spec for group in made.kv_cache_groups]
    firsts = [kind.first_spec if isinstance(kind, UniformTypeKVCacheSpecs) else kind for kind in kinds]
    assert [getattr(first, "window", None) for first in firsts] == [*windows]
    tensors = made.kv_cache_tensors
    assert {(tensor.offset, tensor.block_stride) for tensor in tensors} == {(0, block)}
    assert tensors[0].layer_stride == part
