"""score_pages: against fp64, and against what the two bounds promise."""

from typing import Any

import pytest
import torch

from sparseserve import ops, reference
from sparseserve.testing.cases import DTYPES, GROUPS, HEAD_DIMS, OPCHECKS, Case, paged_kv, sample_grid
from sparseserve.testing.oracle import assert_as_exact
from sparseserve.types import Bound, HeadShape, PageTable

GRID = sample_grid(12, dtype=DTYPES, head_dim=HEAD_DIMS, group=GROUPS, page_size=[96, 128, 192], unit=[16, 32],
                   bound=list(Bound))  # fmt: skip
LENGTHS = [0, 1, 65, 700]


def make(point: dict[str, Any]) -> tuple[Case, torch.Tensor]:
    """A case and its summaries; incomplete units hold NaN."""
    shape = HeadShape(kv_heads=2, queries_per_kv=point["group"], head_dim=point["head_dim"])
    case = paged_kv(LENGTHS, shape, point["page_size"], point["dtype"])
    page_size, unit, head_dim = point["page_size"], point["unit"], case.shape.head_dim
    wide = 2 * page_size // unit * 2 * head_dim + 48
    memory = torch.full((len(case.kv.key), wide), torch.nan, dtype=case.query.dtype)
    summary = memory[:, :-48].view(-1, 2, page_size // unit, 2, head_dim)
    for row in range(len(LENGTHS)):
        ops.summarize_pages(case.kv.key, case.slots(row)[0], summary, point["bound"])
    return case, summary


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_against_fp64(point: dict[str, Any], isa: str) -> None:
    case, summary = make(point)
    arguments = case.query, summary, case.table, point["unit"], point["bound"]
    exact, peer = reference.score_pages(*arguments, dtype=torch.float64), reference.score_pages(*arguments)
    assert_as_exact(ops.score_pages(*arguments), exact, peer, terms=2 * case.shape.head_dim)


def test_min_max_is_an_upper_bound_and_the_sum_of_the_larger_products(isa: str) -> None:
    point = GRID[0] | {"dtype": torch.float32, "group": 1, "bound": Bound.MIN_MAX, "unit": 16, "page_size": 64}
    case, summary = make(point)
    scores = ops.score_pages(case.query, summary, case.table, 16, Bound.MIN_MAX)
    row, complete = 3, LENGTHS[3] // 16
    low, high = reference.paging.row_units(summary, case.pages[row], complete).unbind(2)
    low, high, query = low.float(), high.float(), case.query[row][:, None].float()
    torch.testing.assert_close(scores[row, :, :complete], torch.maximum(query * low, query * high).sum(2))
    keys = reference.paging.row_tokens(case.kv.key, case.pages[row], complete * 16)
    products = (query * keys).sum(2).view(2, -1, 16)
    assert (scores[row, :, :complete, None] >= products - 1e-4).all()


def test_units_beyond_the_row_are_untouched(isa: str) -> None:
    case, summary = make(GRID[1])
    unit = GRID[1]["unit"]
    scores = torch.full((4, 2, case.capacity // unit + 3), -7.0)
    ops.score_pages(case.query, summary, case.table, unit, GRID[1]["bound"], scores=scores)
    for row, length in enumerate(LENGTHS):
        used = -(-length // unit)
        assert (scores[row, :, used:] == -7).all()
        assert (scores[row, :, max(used - 1, 0) : used] == torch.inf).all()  # the last unit is always taken
        assert scores[row, :, : max(used - 1, 0)].isfinite().all()


def test_rows_and_threads_change_nothing(isa: str) -> None:
    case, summary = make(GRID[2])
    arguments = summary, case.table, GRID[2]["unit"], GRID[2]["bound"]
    clean = ops.score_pages(case.query, *arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(ops.score_pages(case.query, *arguments), clean)
    torch.set_num_threads(threads)
    row = slice(3, 4)
    alone = ops.score_pages(case.query[row], summary, PageTable(case.pages[row], case.seq_lens[row]), *arguments[2:])
    assert torch.equal(alone, clean[row])


def test_opcheck() -> None:
    case, summary = make(GRID[0])
    unit = GRID[0]["unit"]
    scores = torch.zeros(4, 2, case.capacity // unit)
    inputs = case.query, summary, case.pages, case.seq_lens, unit, 0, scores
    torch.library.opcheck(torch.ops.sparseserve.score_pages.default, inputs, test_utils=OPCHECKS)
