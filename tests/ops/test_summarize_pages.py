"""summarize_pages: against fp64, and bit for bit the same however a row comes to be."""

from typing import Any

import pytest
import torch

from sparseserve import ops, reference
from sparseserve.testing import target
from sparseserve.testing.cases import DTYPES, HEAD_DIMS, OPCHECKS, Case, paged_kv, sample_grid
from sparseserve.testing.oracle import assert_as_exact
from sparseserve.testing.target import Layout
from sparseserve.types import Bound, HeadShape

GRID = sample_grid(12, dtype=DTYPES, head_dim=HEAD_DIMS, page_size=[64, 128], unit=[16, 32, 64], bound=list(Bound))
LENGTHS = [0, 1, 15, 16, 65, 300]


def name(point: dict[str, Any]) -> str:
    return "-".join(map(str, point.values()))


def make(point: dict[str, Any], lengths: list[int] = LENGTHS) -> Case:
    return paged_kv(lengths, HeadShape(3, 1, point["head_dim"]), point["page_size"], point["dtype"])


def empty(case: Case, point: dict[str, Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Summaries of NaN in pages that are wider than they need to be."""
    shape = 3, point["page_size"] // point["unit"], 2, case.shape.head_dim
    memory = torch.full((len(case.kv.key), torch.Size(shape).numel() + 32), torch.nan, dtype=dtype or case.query.dtype)
    return memory[:, :-32].view(-1, *shape)


def summarize(case: Case, point: dict[str, Any], chunk: int = 1000) -> torch.Tensor:
    summary = empty(case, point)
    for row in range(len(case.seq_lens)):
        for slots in case.slots(row)[0].split(chunk):
            ops.summarize_pages(case.kv.key, slots, summary, point["bound"])
    return summary


def by_reference(case: Case, point: dict[str, Any], dtype: torch.dtype, to: torch.dtype | None = None) -> torch.Tensor:
    summary = empty(case, point, to)
    for row in range(len(case.seq_lens)):
        reference.summarize_pages(case.kv.key, case.slots(row)[0], summary, point["bound"], dtype=dtype)
    return summary


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise, NaN included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("point", GRID, ids=name)
def test_against_fp64(point: dict[str, Any], isa: str) -> None:
    case = make(point)
    exact = by_reference(case, point, torch.float64, torch.float64)
    actual, peer = summarize(case, point), by_reference(case, point, torch.float32)
    assert torch.equal(actual.isnan(), exact.isnan())  # incomplete units and unused pages are left alone
    written = ~exact.isnan()
    assert_as_exact(actual[written], exact[written], peer[written], terms=point["unit"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_minimum_and_maximum_are_keys(dtype: torch.dtype, isa: str) -> None:
    point = GRID[0] | {"dtype": dtype, "bound": Bound.MIN_MAX}
    case = make(point)
    assert equal(summarize(case, point), by_reference(case, point, torch.float32))


def test_a_large_mean_hides_no_deviation(isa: str) -> None:
    """Keys of biased projections: a sum of squares would lose in fp32 what lies far below the mean."""
    point = GRID[0] | {"dtype": torch.float32, "bound": Bound.MEAN_STD}
    case = make(point, [128])
    case.kv.key.add_(1e4 if case.query.dtype is torch.float32 else 500)
    deviation, exact = (pool.nan_to_num()[:, :, :, 1] for pool in (
        summarize(case, point), by_reference(case, point, torch.float64, torch.float64)))  # fmt: skip
    assert (exact > 0.1).any()
    torch.testing.assert_close(deviation.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("point", GRID[:6], ids=name)
@pytest.mark.parametrize("chunk", [1, 13, 64])
def test_chunks_equal_one_prefill(point: dict[str, Any], chunk: int, isa: str) -> None:
    case = make(point)
    assert equal(summarize(case, point, chunk), summarize(case, point))


def test_rows_together_equal_rows_alone(isa: str) -> None:
    case, together = make(GRID[0]), empty(make(GRID[0]), GRID[0])
    slots = torch.cat([torch.tensor([-1]), *(case.slots(row)[0] for row in range(len(LENGTHS)))])
    woven = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))]
    ops.summarize_pages(case.kv.key, woven, together, GRID[0]["bound"])
    assert equal(together, summarize(case, GRID[0]))


def test_all_instruction_sets_agree(cpu_isa: str) -> None:
    for point in GRID:
        case = make(point)
        summary = summarize(case, point)
        ops.use_isa("portable")
        other = summarize(case, point)
        ops.use_isa(cpu_isa)
        assert equal(summary, other)


@pytest.mark.parametrize("bound", list(Bound))
def test_cuda_agrees_with_the_cpu(bound: Bound) -> None:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    point = {"dtype": torch.bfloat16, "head_dim": 64, "page_size": 64, "unit": 32, "bound": bound}
    summary = summarize(make(point), point)
    with target.simulated(Layout.LBNHC):
        assert equal(summarize(make(point), point), summary)


def test_bad_input_is_refused() -> None:
    case, summary = make(GRID[0]), empty(make(GRID[0]), GRID[0])
    slots, _ = case.slots(5)
    with pytest.raises(RuntimeError, match="lies outside"):
        ops.summarize_pages(case.kv.key, slots + 10_000, summary, Bound.MIN_MAX)
    with pytest.raises(RuntimeError, match="multiple of 16 tokens"):
        ops.summarize_pages(case.kv.key, slots, torch.zeros(len(summary), 3, 32, 2, summary.shape[4]), Bound.MIN_MAX)
    with pytest.raises(RuntimeError, match="summary"):
        ops.summarize_pages(case.kv.key, slots, summary.double(), Bound.MIN_MAX)


def test_opcheck() -> None:
    case, summary = make(GRID[0]), empty(make(GRID[0]), GRID[0])
    inputs = case.kv.key, case.slots(5)[0], summary, 1
    torch.library.opcheck(torch.ops.sparseserve.summarize_pages.default, inputs, test_utils=OPCHECKS)
