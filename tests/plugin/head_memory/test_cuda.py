"""Heads stored in groups on CUDA, without a GPU: vLLM's runner V2 on CPU tensors, the CUDA kernels in the simulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.utils import clear_layer_kv_caches
from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager, reset_workspace_manager

from sparseserve.decode.step import StepWorkspace
from sparseserve.errors import UnsupportedError
from sparseserve.plugin.backends.cuda import SparseCUDABackend, SparseCUDABuilder
from sparseserve.plugin.backends.layers import impl_of
from sparseserve.plugin.head_memory import manager
from sparseserve.plugin.head_memory.attention import GroupedHeads
from sparseserve.plugin.watch import meter as stats
from sparseserve.policies import Dense, Moa, Policy, Retrieval, Streaming
from sparseserve.testing import target
from sparseserve.testing.bed import Bed
from sparseserve.testing.target import Layout
from sparseserve.types import CPU, LayerPlan
from tests.helpers.plugin.cuda_worker import (
    LAYERS,
    MAX_LEN,
    PAGE,
    Batch,
    GroupedWorker,
    model_shape,
    only_resource,
    stand_in_for_flash_attention,
    without_values,
)
from tests.helpers.plugin.cuda_worker import vllm_config as config_of
from tests.helpers.plugin.worker_metrics import tokens_of

pytestmark = pytest.mark.vllm

LENGTHS = [385, 448, 300, 150, 20]
DECODE = Batch(LENGTHS, [1] * 5, padding=2)
ALL = list(range(len(LENGTHS)))
SHAPE = model_shape()
Start = Callable[..., GroupedWorker]
Tokens = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """Layers with one, no and only heads that keep everything; one group; six groups of three windows."""
    folder = tmp_path_factory.mktemp("artifacts")
    heads, plan, rounded = folder / "heads.json", folder / "plan.json", folder / "rounded.json"
    heads.write_text(json.dumps({"0": [0], "1": [], "2": [0, 1]}))
    alphas = [[0, 0, 128, 128], [128, 128, 128, 64], [200, 128, 128, 200]]
    betas = [[0, 1, 0, 0], [0, 0, 0.3, 0.2], [0, 0.2, 0, 0]]
    plan.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    # At 448 tokens 350 of them leave a gap, but no page of 64 that is free.
    rounded.write_text(json.dumps({"alphas": [[350, 350, 128, 128]] * LAYERS, "betas": [[0] * 4] * LAYERS}))
    windows: dict[str, Any] = {"artifact": str(heads), "sink_tokens": 16, "recent_tokens": 112}
    return {
        "retrieval": Retrieval(**windows, min_tokens=0),
        "retrieval-long": Retrieval(**windows, min_tokens=200),
        "streaming": Streaming(sink_tokens=0, recent_tokens=100, min_tokens=0),
        "moa": Moa(artifact=str(plan), min_tokens=0),
        "rounded": Moa(artifact=str(rounded), sink_tokens=16, min_tokens=0),
    }


@pytest.fixture(params=["retrieval", "retrieval-long", "streaming", "moa"])
def policy(request: pytest.FixtureRequest, policies: dict[str, Policy]) -> Policy:
    return policies[request.param]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    manager.register()
    return config_of(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Start:
    stand_in_for_flash_attention(monkeypatch)
    return lambda policy, **options: GroupedWorker(config, policy, **options)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels as on CUDA: the blocks of all launches meet in the one scratch that a step has."""
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)

    measured = StepWorkspace.allocate

    def allocate(*arguments: Any) -> StepWorkspace:
        like = measured(*(*arguments[:-1], torch.device("meta")))
        assert like.scratch is not None
        return StepWorkspace(torch.zeros(like.scores.shape), torch.zeros(like.scratch.shape))

    monkeypatch.setattr(StepWorkspace, "allocate", allocate)
    with target.simulated(Layout.LBHNC):
        yield


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Query [L, B, T, Hq, D], key and value [L, B, T, H, D] of all rows."""
    random = torch.Generator().manual_seed(3)
    shape, heads = (LAYERS, len(LENGTHS), MAX_LEN), SHAPE.heads
    query = torch.randn(*shape, heads.query_heads, heads.head_dim, generator=random)
    key, value = torch.randn(2, *shape, heads.kv_heads, heads.head_dim, generator=random)
    return query.bfloat16() * 2, key.bfloat16(), value.bfloat16()


def grouped(layer: Attention) -> GroupedHeads:
    """The groups of a layer's heads."""
    heads = impl_of(layer).heads
    assert heads is not None
    return heads


def new_tokens(half: Tensor, batch: Batch, rows: list[int]) -> Tensor:
    """Those of a batch [L, T, ...], NaN for padding."""
    ends = zip(rows, batch.lengths, batch.new, strict=True)
    mine = torch.cat([half[:, row, length - new : length] for row, length, new in ends], 1)
    return torch.nn.functional.pad(mine, (0, 0, 0, 0, 0, batch.padding), value=torch.nan)


def step(worker: GroupedWorker, tokens: Tokens, batch: Batch, rows: list[int], capture: bool = False) -> Tensor:
    """The outputs [L, T, Hq, D] of a batch."""
    return worker.run(*worker.build(batch, rows, capture), *(new_tokens(half, batch, rows) for half in tokens))


def filled(worker: GroupedWorker, tokens: Tokens, rows: list[int]) -> GroupedWorker:
    """The worker once `rows` have all tokens but the last, with what they free spoilt."""
    before = [LENGTHS[row] - 1 for row in rows]
    batch = Batch(before, before, [True] * len(rows))
    _, slots = worker.build(batch, rows)
    worker.write(slots, *(new_tokens(half, batch, rows) for half in tokens[1:]))
    for row, length in zip(rows, before, strict=True):
        worker.spoil(row, length)
    return worker


def expected_decode(policy: Policy, tokens: Tokens) -> Tensor:
    """What the last tokens of all rows get [L, B, Hq, D] where all heads keep everything."""
    query = torch.stack([tokens[0][:, row, length - 1] for row, length in enumerate(LENGTHS)], 1)
    sparse, dense = (Bed(which, SHAPE, LENGTHS).fill(*tokens[1:]).decode(query).out for which in (policy, Dense()))
    short = torch.tensor(LENGTHS) <= policy.dense_up_to
    return torch.where(short[:, None, None], dense, sparse)


@pytest.mark.parametrize("captured", [False, True])
def test_a_decode_batch_attends_to_the_windows_of_its_heads(
    start: Start, simulator: None, tokens: Tokens, policy: Policy, captured: bool
) -> None:
    worker = filled(start(policy), tokens, ALL)
    null = worker.groups.pages[0].clone()
    out = step(worker, tokens, DECODE, ALL, captured)
    assert torch.equal(out[:, : len(LENGTHS)], expected_decode(policy, tokens))
    assert not out[:, len(LENGTHS) :].any()  # rows of padding
    assert torch.equal(worker.groups.pages[0], null)


def masks(policy: Policy, plan: LayerPlan, length: int) -> Tensor:
    """What the query heads of every token of a row may attend to, [Hq, T, T] bool."""
    lengths, token = torch.arange(1, length + 1, dtype=torch.int32), torch.arange(length)
    seen = (token < lengths[:, None])[None]
    if plan.window is not None:
        spans = plan.window.spans(lengths).transpose(0, 1)[..., None]
        inside = (token < spans[:, :, 0]) | (token >= spans[:, :, 1])
        seen = seen & (inside | (lengths <= policy.dense_up_to)[:, None])
    return seen.repeat_interleave(SHAPE.heads.query_heads // len(seen), 0)


def expected_prompt(policy: Policy, tokens: Tokens, row: int) -> Tensor:
    """What all tokens of a row get, [L, T, Hq, D]."""
    length = LENGTHS[row]
    query, key, value = (half[:, row, :length].transpose(1, 2).float() for half in tokens)
    key, value = (half.repeat_interleave(SHAPE.heads.queries_per_kv, 1) for half in (key, value))
    seen = torch.stack([masks(policy, plan, length) for plan in policy.plans(SHAPE)])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)


def prompt(worker: GroupedWorker, tokens: Tokens, row: int, chunks: list[int]) -> Tensor:
    """What all tokens of a row get, chunk by chunk, beside a row that decodes; what is freed is spoilt."""
    beside = filled(worker, tokens, [0])
    done, outs = 0, []
    for chunk in chunks:
        done += chunk
        batch, rows = Batch([LENGTHS[0], done], [1, chunk], [False, True]), [0, row]
        outs.append(step(beside, tokens, batch, rows)[:, 1:])
        worker.spoil(row, done)
    return torch.cat(outs, 1)


def test_prompts_attend_to_the_same_windows_whatever_their_chunks(
    start: Start, simulator: None, tokens: Tokens, policy: Policy
) -> None:
    row, length = 2, LENGTHS[2]
    expected = expected_prompt(policy, tokens, row)
    whole, *chunked = (
        prompt(start(policy), tokens, row, chunks) for chunks in ([length], [64] * 4 + [44], [99, 1, 150, 49, 1])
    )
    torch.testing.assert_close(whole.float(), expected, rtol=2e-2, atol=2e-2)
    heads = [grouped(layer) for layer in start(policy).layers]
    for out in chunked:
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
        for layer, mine in enumerate(heads):
            if mine.windowed is not None:
                assert torch.equal(out[layer][:, mine.windowed.query], whole[layer][:, mine.windowed.query])


def test_heads_that_free_no_page_attend_to_everything_in_prompts_and_in_decode(
    start: Start, simulator: None, tokens: Tokens, policies: dict[str, Policy]
) -> None:
    policy = policies["rounded"]
    worker, plans = start(policy), policy.plans(SHAPE)
    full = [grouped(layer).full for layer in worker.layers]
    assert [heads.kv.tolist() for heads in full if heads is not None] == [[0]] * LAYERS
    assert all(masks(policy, plan, MAX_LEN)[0, -1].all() for plan in plans)
    expected = expected_prompt(policy, tokens, 1)
    for chunks in ([448], [446, 1, 1]):
        out = prompt(start(policy), tokens, 1, chunks)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_replayed_step_reads_what_the_builder_wrote_for_its_batch(
    start: Start, simulator: None, tokens: Tokens, policy: Policy
) -> None:
    """A graph has the addresses of the batch that it was captured with, vLLM's own buffers among them."""
    worker = start(policy)
    captured, slots = worker.build(Batch([1] * 7, [1] * 7), [0] * 7, capture=True)
    decode = captured[worker.layers[0].layer_name].decode
    filled(worker, tokens, ALL)
    _, now = worker.build(DECODE, ALL)
    decode.table.seq_lens.copy_(torch.tensor([*LENGTHS, 0, 0]))
    for name, mine in slots.items():
        mine.copy_(now[name])
    out = worker.run(captured, slots, *(new_tokens(half, DECODE, ALL) for half in tokens))
    assert torch.equal(out[:, : len(LENGTHS)], expected_decode(policy, tokens))
    assert not out[:, len(LENGTHS) :].any()


def test_what_a_step_leaves_does_not_reach_the_next(
    start: Start, simulator: None, tokens: Tokens, policy: Policy
) -> None:
    last = Batch([448, 300, 20], [1, 1, 20], [False, False, True]), [1, 2, 4]
    fresh = step(filled(start(policy), tokens, ALL), tokens, *last)
    used = filled(start(policy), tokens, ALL)
    step(used, tokens, Batch([1, 448], [1, 1], padding=5), [4, 1], capture=True)
    step(used, tokens, Batch([150, 40], [1, 40], [False, True]), [3, 4])
    assert torch.equal(step(used, tokens, *last), fresh)


def test_pages_can_be_allocated_anew(
    start: Start, simulator: None, tokens: Tokens, policies: dict[str, Policy]
) -> None:
    """vLLM profiles its graphs on pages that it throws away."""
    worker = filled(start(policies["moa"]), tokens, ALL)
    step(worker, tokens, DECODE, ALL, capture=True)
    clear_layer_kv_caches(worker.context.values())
    worker.allocate()
    out = step(filled(worker, tokens, ALL), tokens, DECODE, ALL)
    assert torch.equal(out[:, : len(LENGTHS)], expected_decode(policies["moa"], tokens))


@pytest.mark.parametrize("batch", [DECODE, Batch(LENGTHS, [1, 1, 1, 50, 20], [False] * 3 + [True] * 2)], ids=str)
def test_no_step_waits_for_the_device(
    start: Start, tokens: Tokens, policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device `meta` have no values: reading one raises, and so does a shape that depends on one."""
    without_values(monkeypatch)
    worker = start(policy, device="meta")
    mine = [new_tokens(half, batch, ALL).to("meta") for half in tokens]
    for capture in (True, False):
        worker.run(*worker.build(batch, ALL, capture), *mine)


def test_prompts_need_no_schedule_of_one_number_of_heads(
    start: Start, tokens: Tokens, policies: dict[str, Policy]
) -> None:
    """FA3 is given one by vLLM's builder, which would ask for it here, where there is none to ask."""
    worker = start(policies["retrieval"])
    builder = worker.attention[0][0].get_metadata_builder()
    assert isinstance(builder, SparseCUDABuilder)
    builder.aot_schedule = True
    metadata, _ = worker.build(Batch([300, 150], [300, 150], [True, True]), [2, 3])
    of_heads = metadata[worker.layers[0].layer_name].vllm
    assert {heads: mine.scheduler_metadata for heads, mine in of_heads.items()} == {1: None, 2: None}


def test_the_profiling_run_allocates_what_the_builder_takes(
    start: Start, simulator: None, tokens: Tokens, policies: dict[str, Policy]
) -> None:
    init_workspace_manager(CPU)
    try:
        worker = start(policies["retrieval"])
        init_workspace_manager(CPU)  # as if only the layers were there
        mine = [half[:, 0, :3] for half in tokens]
        assert not worker.run(None, {}, *mine).any()
        current_workspace_manager().lock()
        group = worker.attention[0][0]
        group.create_metadata_builders(worker.config, CPU)
        memory = only_resource()
        assert memory.scratch is not None
        scratches = [grouped(layer).scratch for layer in worker.layers]
        places = {None if scratch is None else scratch.data_ptr() for scratch in scratches}
        assert places == {memory.scratch.data_ptr()}
    finally:
        reset_workspace_manager()


def test_tokens_of_rows_under_the_policy_are_counted(
    start: Start, simulator: None, tokens: Tokens, policies: dict[str, Policy]
) -> None:
    policy = policies["retrieval-long"]
    worker = filled(start(policy), tokens, ALL)
    stats.snapshot()
    before = tokens_of("retrieval", "window")
    step(worker, tokens, DECODE, ALL)
    stats.snapshot()
    long = LENGTHS[:3]  # of two layers, one with a head of two that keeps everything
    counted = sum((length + 128) / 2 + 128 for length in long), 2 * sum(long)
    assert tokens_of("retrieval", "window") == [old + new for old, new in zip(before, counted, strict=True)]


def test_pages_of_another_size_than_the_groups_were_made_for_are_refused(
    start: Start, policies: dict[str, Policy]
) -> None:
    worker = start(policies["retrieval"])
    spec = worker.layers[0].get_kv_cache_spec(worker.config)
    assert isinstance(spec, AttentionSpec)
    with pytest.raises(UnsupportedError, match="--block-size = 64 .*128.*give --block-size 128"):
        SparseCUDABackend.customize_spec(replace(spec, block_size=2 * PAGE))


def test_layouts_and_graphs_that_groups_allow(start: Start, policies: dict[str, Policy]) -> None:
    worker = start(policies["moa"])
    assert [layout.name for layout in SparseCUDABackend.supported_kv_cache_layouts()] == ["BLHNC"]
    assert worker.graphs.min_cg_support.name == "UNIFORM_SINGLE_TOKEN_DECODE"
    pages, names = worker.groups.pages, worker.groups.names
    assert len(names) > 3
    for name in names[1:]:  # all groups have the whole pool
        mine = worker.context[name].kv_cache
        assert (mine.data_ptr(), mine.shape, mine.stride()) == (pages.data_ptr(), pages.shape, pages.stride())
