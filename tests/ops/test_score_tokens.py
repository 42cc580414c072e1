"""score_tokens: the attention mass of units, against fp64."""

from typing import Any

import pytest
import torch

from sparseserve import ops, reference
from sparseserve.testing.cases import DTYPES, GROUPS, HEAD_DIMS, OPCHECKS, UNITS, Case, paged_kv, sample_grid
from sparseserve.testing.oracle import assert_as_exact
from sparseserve.types import HeadShape, PageTable, Scope

GRID = sample_grid(14, dtype=DTYPES, head_dim=HEAD_DIMS, group=GROUPS, page_size=[64, 128], unit=UNITS,
                   scope=list(Scope))  # fmt: skip
LENGTHS = [0, 1, 65, 1100]
UNTOUCHED = -7.0


def make(point: dict[str, Any]) -> tuple[Case, torch.Tensor, int]:
    """A case, its dense lse and the number of selection heads."""
    shape = HeadShape(kv_heads=2, queries_per_kv=point["group"], head_dim=point["head_dim"])
    case = paged_kv(LENGTHS, shape, point["page_size"], point["dtype"])
    lse = torch.zeros(len(LENGTHS), shape.query_heads)
    for row, length in enumerate(LENGTHS):
        keys = reference.paging.row_tokens(case.kv.key, case.pages[row], length)
        lse[row] = reference.paging.logits(case.query[row], keys, case.scale).logsumexp(1)
    return case, lse, shape.selection_heads(point["scope"])


def score(function: Any, case: Case, lse: torch.Tensor, heads: int, unit: int, **options: Any) -> torch.Tensor:
    scores = torch.full((len(case.seq_lens), heads, case.capacity // unit), UNTOUCHED, dtype=options.get("dtype"))
    function(case.query, case.kv.key, case.table, lse, case.scale, scores, unit, **options)
    return scores


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_against_fp64(point: dict[str, Any], isa: str) -> None:
    case, lse, heads = make(point)
    unit = point["unit"]
    actual = score(ops.score_tokens, case, lse, heads, unit)
    exact = score(reference.score_tokens, case, lse, heads, unit, dtype=torch.float64)
    peer = score(reference.score_tokens, case, lse, heads, unit)
    untouched = exact == UNTOUCHED
    assert torch.equal(actual == UNTOUCHED, untouched)
    # exp turns the absolute error of a logit, about |q||k| scale, into a relative one.
    magnitude = exact[~untouched].max().item() * 2 * case.scale * case.shape.head_dim
    terms = case.shape.head_dim + unit * case.shape.query_heads // heads
    assert_as_exact(actual, exact, peer, terms, magnitude)
    mass = actual.where(~untouched, 0).sum((1, 2))
    assert mass[1:] == pytest.approx(case.shape.query_heads, rel=1e-3) and mass[0] == 0


def test_threads_and_rows_change_nothing(isa: str) -> None:
    case, lse, heads = make(GRID[0])
    clean = score(ops.score_tokens, case, lse, heads, 16)
    row = slice(3, 4)
    scores = torch.full_like(clean[row], UNTOUCHED)
    ops.score_tokens(
        case.query[row], case.kv.key, PageTable(case.pages[row], case.seq_lens[row]), lse[row], case.scale, scores, 16
    )
    assert torch.equal(scores, clean[row])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(score(ops.score_tokens, case, lse, heads, 16), clean)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("unit", [2, 8, 128])
def test_other_units_are_refused(unit: int) -> None:
    case, lse, heads = make(GRID[0])
    with pytest.raises(RuntimeError, match="unit_tokens must be"):
        ops.score_tokens(case.query, case.kv.key, case.table, lse, 1.0, torch.zeros(4, heads, 2000), unit)


def test_scores_must_hold_the_longest_row() -> None:
    case, lse, heads = make(GRID[0])
    with pytest.raises(RuntimeError, match="too small for 1100 tokens"):
        ops.score_tokens(case.query, case.kv.key, case.table, lse, 1.0, torch.zeros(4, heads, 34), 32)


def test_opcheck() -> None:
    case, lse, heads = make(GRID[1])
    inputs = case.query, case.kv.key, case.pages, case.seq_lens, lse, case.scale, 32, torch.zeros(4, heads, 40)
    torch.library.opcheck(torch.ops.sparseserve.score_tokens.default, inputs, test_utils=OPCHECKS)
