"""The CUDA backend without a GPU: vLLM's own classes on CPU tensors, the CUDA kernels in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.config import VllmConfig

from sparseserve.decode.step import StepBuffers, StepWorkspace
from sparseserve.ops import step_scratch
from sparseserve.plugin.backends.cuda import SparseCUDABackend
from sparseserve.plugin.backends.layers import impl_of
from sparseserve.plugin.watch import meter as stats
from sparseserve.plugin.watch.requests import ServedRequest
from sparseserve.policies import S2, Dense, Hip, Policy, Quest, Streaming, Tidal
from sparseserve.request_options import RequestOptions
from sparseserve.testing import target
from sparseserve.testing.bed import Bed
from sparseserve.testing.target import Layout
from sparseserve.types import CPU, PageTable
from tests.helpers.plugin.cuda_worker import (
    LAYERS,
    MAX_LEN,
    PAGE,
    POOL,
    Batch,
    Worker,
    model_shape,
    stand_in_for_flash_attention,
    step_of,
    vllm_config,
    without_values,
)
from tests.helpers.plugin.worker_metrics import recall_of, tokens_of

pytestmark = pytest.mark.vllm

COMMON: dict[str, Any] = {"budget_tokens": 128, "sink_tokens": 16, "recent_tokens": 32, "min_tokens": 200}
HIP: dict[str, Any] = {"chunk_tokens": (32, 16, 8), "stage_tokens": (256, 128), "wide_layers": 0}
POLICIES: dict[str, Policy] = {
    "dense": Dense(min_tokens=200),
    "streaming": Streaming(sink_tokens=16, recent_tokens=112, min_tokens=200, kv_memory="shared"),
    "quest": Quest(**COMMON, dense_layers=1),
    "quest-recall": Quest(**COMMON, dense_layers=1, recall_sample=1),
    "tidal": Tidal(**COMMON, select_layer=1, reselect_layer=(1,)),
    "hip": Hip(**COMMON, **HIP),
    "s2": S2(local_blocks=2, stride=2, min_tokens=200),
}
LONG, SHORT, IN_PROMPT = [385, 448, 300], [150, 20], [350]
LENGTHS = [*LONG, *SHORT, *IN_PROMPT]
DECODE = Batch(LENGTHS, [1] * 6, [False] * 5 + [True], padding=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Worker]:
    stand_in_for_flash_attention(monkeypatch)
    return lambda policy, **options: Worker(config, policy, patch=monkeypatch, **options)


@pytest.fixture(params=[Layout.LBHNC, Layout.LBNHC], ids=str)
def layout(request: pytest.FixtureRequest) -> Iterator[str]:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with target.simulated(request.param):
        yield request.param.value


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Query [L, B, Hq, D], key and value [L, B, T, H, D]."""
    random = torch.Generator().manual_seed(3)
    heads = model_shape().heads
    query = torch.randn(LAYERS, len(LENGTHS), heads.query_heads, heads.head_dim, generator=random)
    key, value = torch.randn(2, LAYERS, len(LENGTHS), MAX_LEN, heads.kv_heads, heads.head_dim, generator=random)
    return query.bfloat16() * 2, key.bfloat16(), value.bfloat16()


def filled(worker: Worker, pages: Tensor, key: Tensor, value: Tensor) -> None:
    """Write all tokens but the last of every row, as prompts."""
    prompts = Batch([length - 1 for length in LENGTHS], [length - 1 for length in LENGTHS], [True] * len(LENGTHS))
    common = prompts.metadata(pages, "cpu")
    metadata = worker.builder.build(0, common)
    assert step_of(metadata) is None
    for layer in range(LAYERS):
        rows = [[half[layer, row, : length - 1] for row, length in enumerate(LENGTHS)] for half in (key, value)]
        keys, values = map(torch.cat, rows)
        worker.write(layer, metadata, keys, values, common.slot_mapping)


def stepped(worker: Worker, metadata: Any, slots: Tensor, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The outputs [T, Hq, D] of all layers for tokens [L, T, ...]."""
    outputs = []
    for layer in range(LAYERS):
        worker.write(layer, metadata, key[layer], value[layer], slots)
        outputs.append(worker.forward(layer, metadata, query[layer], key[layer], value[layer]))
    return outputs


def page_table(bed: Bed) -> Tensor:
    """The pages of the bed's rows, shifted by one as vLLM keeps page 0, and page 0 for rows of padding."""
    return torch.nn.functional.pad(bed.pages + 1, (0, 0, 0, 2))


def last_tokens(half: Tensor, fill: float) -> Tensor:
    """Of every row [L, B + padding, H, D]; `fill` for padding."""
    last = torch.stack([half[:, row, length - 1] for row, length in enumerate(LENGTHS)], 1)
    return torch.nn.functional.pad(last, (0, 0, 0, 0, 0, 2), value=fill)


@pytest.mark.parametrize("captured", [False, True])
def test_a_decode_batch_attends_to_what_the_policy_selects(
    start: Callable[..., Worker], layout: str, policy: Policy, captured: bool
) -> None:
    query, key, value = data()
    bed = Bed(policy, model_shape(), LENGTHS).fill(key, value)
    dense = Bed(Dense(), model_shape(), LENGTHS).fill(key, value).decode(query).out
    expected = bed.decode(query).out
    expected[:, len(LONG) :] = dense[:, len(LONG) :]
    worker = start(policy, layout=layout)
    pages = page_table(bed)
    filled(worker, pages, key, value)
    common = DECODE.metadata(pages, "cpu")
    build = worker.builder.build_for_cudagraph_capture if captured else lambda common: worker.builder.build(0, common)
    nan = torch.nan
    queries = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, 2), value=nan)
    before = [cache[0].clone() for cache in worker.caches]
    outputs = stepped(
        worker, build(common), common.slot_mapping, queries, last_tokens(key, nan), last_tokens(value, nan)
    )
    for layer, out in enumerate(outputs):
        assert torch.equal(out[: len(LENGTHS)], expected[layer])
        assert not out[len(LENGTHS) :].any()  # rows of padding
        assert torch.equal(worker.caches[layer][0], before[layer])


class Asked:
    """Stands for the requests of a worker: row r is one of `requests`."""

    def __init__(self, *requests: ServedRequest) -> None:
        self.requests, self.policy = requests, None

    def rows(self, common: Any) -> list[ServedRequest | None]:
        return [*self.requests, *[None] * (common.num_reqs - len(self.requests))]


def test_rows_attend_to_what_their_requests_asked_for(start: Callable[..., Worker], layout: str) -> None:
    query, key, value = data()
    policy = POLICIES["quest"]
    bed = Bed(policy, model_shape(), LENGTHS).fill(key, value)
    worker = start(policy, layout=layout)
    pages = page_table(bed)
    filled(worker, pages, key, value)
    asked = RequestOptions(), RequestOptions(dense=True), RequestOptions(budget_tokens=256)
    worker.builder.serve(cast(Any, Asked(*map(ServedRequest.of, asked))))  # has what the builder asks for
    common = DECODE.metadata(pages, "cpu")
    metadata = worker.builder.build(0, common)
    padded = [torch.nn.functional.pad(query, (0, 0, 0, 0, 0, 2)), last_tokens(key, 0), last_tokens(value, 0)]
    outputs = stepped(worker, metadata, common.slot_mapping, *padded)
    plain, wider = bed.decode(query).out, bed.decode(query, row_budget=torch.full((6,), 256, dtype=torch.int32)).out
    dense = Bed(Dense(), model_shape(), LENGTHS).fill(key, value).decode(query).out
    assert not torch.equal(plain[:, 2], wider[:, 2])
    for layer, out in enumerate(outputs):
        for row, expected in enumerate((plain, dense, wider)):
            assert torch.equal(out[row], expected[layer, row])


def test_prompts_beside_decodes_are_the_parents(start: Callable[..., Worker], layout: str) -> None:
    query, key, value = data()
    policy, new = POLICIES["quest"], [1, 1, 1, 1, 20, 5]
    bed = Bed(policy, model_shape(), LENGTHS).fill(key, value)
    worker = start(policy, layout=layout)
    pages = page_table(bed)
    filled(worker, pages, key, value)
    common = Batch(LENGTHS, new, [False] * 4 + [True] * 2).metadata(pages, "cpu")
    metadata = worker.builder.build(0, common)
    step = step_of(metadata)
    assert step is not None and step.table.seq_lens.tolist() == LENGTHS[:4]
    tokens = [
        torch.cat(
            [half[:, row, length - many : length] for row, (length, many) in enumerate(zip(LENGTHS, new, strict=True))],
            1,
        )
        for half in (key, value)
    ]
    queries = torch.cat([query[:, row : row + 1].repeat(1, many, 1, 1) for row, many in enumerate(new)], 1)
    outputs = stepped(worker, metadata, common.slot_mapping, queries, *tokens)
    sparse, dense = bed.decode(query).out, Bed(Dense(), model_shape(), LENGTHS).fill(key, value).decode(query).out
    for layer, out in enumerate(outputs):
        assert torch.equal(out[:3], sparse[layer, :3])
        assert torch.equal(out[3], dense[layer, 3])  # decodes, but is short
        for row, last in ((4, 4 + 19), (5, 4 + 20 + 4)):  # a prompt's last query sees the whole row
            torch.testing.assert_close(out[last], dense[layer, row], rtol=2e-2, atol=2e-2)


def test_batches_of_short_rows_are_the_parents_unless_captured(start: Callable[..., Worker]) -> None:
    worker = start(POLICIES["quest"])
    common = Batch(SHORT, [1, 1]).metadata(torch.zeros(2, 7, dtype=torch.int32), "cpu")
    assert step_of(worker.builder.build(0, common)) is None
    step = step_of(worker.builder.build_for_cudagraph_capture(common))
    assert step is not None and step.row_budget is not None
    assert step.row_budget.flatten().tolist() == SHORT


@pytest.mark.parametrize("batch", [DECODE, Batch(LENGTHS, [1, 1, 1, 1, 20, 5], [False] * 4 + [True] * 2)], ids=str)
def test_no_step_waits_for_the_device(
    start: Callable[..., Worker], policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device `meta` have no values: reading one raises, and so does a shape that depends on one."""
    without_values(monkeypatch)
    worker = start(policy, device="meta")
    common = batch.metadata(torch.zeros(8, 7, dtype=torch.int32), "meta")
    for build in (worker.builder.build_for_cudagraph_capture, lambda common: worker.builder.build(0, common)):
        metadata = build(common)
        assert step_of(metadata) is not None
        tokens = common.num_actual_tokens
        query, key, value = (torch.empty(LAYERS, tokens, heads, 64, device="meta").bfloat16() for heads in (4, 2, 2))
        stepped(worker, metadata, common.slot_mapping, query, key, value)


def test_every_step_has_the_same_buffers(start: Callable[..., Worker], policy: Policy) -> None:
    worker = start(policy)
    pages = torch.zeros(8, 7, dtype=torch.int32)

    def addresses(lengths: list[int]) -> list[int]:
        batch = Batch(lengths, [1] * 4).metadata(pages, "cpu")
        step = step_of(worker.builder.build_for_cudagraph_capture(batch))
        assert step is not None and step.row_budget is not None
        chosen = step.selection, step.everything
        buffers = [part for each in chosen for part in (each.spans, each.units, each.count)]
        buffers += [step.windows, step.scores, step.lse, step.attended, step.attended_dense, step.row_budget]
        if (measurement := step.measurement) is not None:
            buffers += [measurement.spans, measurement.recall, measurement.error]
        return [buffer.data_ptr() for buffer in buffers]

    assert addresses([1, 1, 1, 1]) == addresses([448, 3, 300, 150])


def test_scratch_serves_steps_of_any_number_of_rows(layout: str) -> None:
    query, key, value = data()
    shape = model_shape()
    bed = Bed(Dense(), shape, LENGTHS).fill(key, value)
    heads, kv = shape.heads, bed.layers[0].kv
    scratch = step_scratch(len(LENGTHS), heads.query_heads, heads.head_dim, CPU)
    memory = StepWorkspace(torch.empty(len(LENGTHS), 1, 0), scratch)
    buffers = StepBuffers(Dense(), Dense().plans(shape), heads, len(LENGTHS), MAX_LEN, CPU, memory)
    for rows in (1, 6, 2, 6):
        lengths = torch.tensor(LENGTHS[:rows], dtype=torch.int32)
        step = buffers.step(PageTable(bed.pages[:rows], lengths))
        chosen, out = step.everything, torch.empty_like(query[0, :rows])
        torch.ops.sparseserve_simulator.attend(
            *(query[0, :rows], kv.key, kv.value, bed.pages[:rows], lengths, chosen.spans, chosen.units, chosen.count),
            *(chosen.unit_tokens, 0.125, out, step.lse, step.attended_dense[0], None, step.scratch),
        )
        assert torch.equal(out, bed.decode(query).out[0, :rows])


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC"])
def test_pages_have_room_for_summaries_in_both_layouts(start: Callable[..., Worker], name: str) -> None:
    worker = start(POLICIES["quest"], layout=name)
    heads = model_shape().heads
    extra = POLICIES["quest"].page_state_bytes(heads, PAGE, 2)
    assert worker.spec.page_size_bytes == worker.spec.unpadded_page_size_bytes + extra
    assert [layout.name for layout in SparseCUDABackend.supported_kv_cache_layouts()] == ["LBHNC", "LBNHC"]
    for layer, cache in zip(worker.layers, worker.caches, strict=True):
        assert cache.shape == (POOL, heads.kv_heads, PAGE, 2 * heads.head_dim)
        bound = impl_of(layer).bound(cache)
        assert bound.page_state is not None
        bound.page_state.fill_(7)
        assert not cache.any()  # summaries lie outside of keys and values
        bound.kv.key.fill_(1), bound.kv.value.fill_(2)
        assert (bound.page_state == 7).all() and cache.float().mean() == 1.5


def test_tokens_are_counted_without_waiting(start: Callable[..., Worker], layout: str) -> None:
    query, key, value = data()
    policy = POLICIES["quest-recall"]
    bed = Bed(policy, model_shape(), LENGTHS).fill(key, value)
    worker = start(policy, layout=layout)
    pages = page_table(bed)
    filled(worker, pages, key, value)
    kept, rows = recall_of("quest", 1)
    stats.snapshot()
    before = tokens_of("quest", "select")
    common = DECODE.metadata(pages, "cpu")
    padded = [torch.nn.functional.pad(query, (0, 0, 0, 0, 0, 2)), last_tokens(key, 0), last_tokens(value, 0)]
    stepped(worker, worker.builder.build(0, common), common.slot_mapping, *padded)
    assert tokens_of("quest", "select") == before
    stats.snapshot()
    expected = bed.decode(query)
    attended = sum(float(layer[: len(LONG)].double().mean(1).sum()) for layer in expected.attended[1:])
    assert tokens_of("quest", "select") == [before[0] + attended, before[1] + 2 * sum(LONG)]
    assert recall_of("quest", 1) == (kept, rows)  # what was measured is looked at before the next step
    worker.builder.build(0, common)
    assert recall_of("quest", 1)[1] - rows == len(LONG)
    assert expected.measurement is not None
    assert recall_of("quest", 1)[0] - kept == pytest.approx(float(expected.measurement.recall[1, : len(LONG)].sum()))


def test_vllm_refuses_what_the_backend_does_not_declare() -> None:
    assert SparseCUDABackend.get_name() == "CUSTOM"
    assert not SparseCUDABackend.supports_kv_cache_dtype("fp8") and SparseCUDABackend.supports_kv_cache_dtype("auto")
    assert [size for size in range(8, 513, 8) if SparseCUDABackend.supports_head_size(size)] == [64, 96, 128, 256]
    unsupported = ("dcp", "pcp", "sink", "mm_prefix", "rswa", "non_causal", "kv_connector")
    assert not [name for name in unsupported if getattr(SparseCUDABackend, f"supports_{name}")()]
