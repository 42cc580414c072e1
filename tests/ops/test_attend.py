"""attend: exact, blind to what is not selected, and the same for a row whatever stands around it."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from sparseserve import ops, reference
from sparseserve.testing import target
from sparseserve.testing.cases import (
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    OPCHECKS,
    PAGE_SIZES,
    UNITS,
    Case,
    paged_kv,
    random_selection,
    sample_grid,
)
from sparseserve.testing.oracle import assert_as_exact, torch_attend
from sparseserve.testing.target import Layout
from sparseserve.types import HeadShape, PagedKV, Scope, Selection

GRID = sample_grid(
    24, dtype=DTYPES, head_dim=HEAD_DIMS, group=GROUPS, page_size=PAGE_SIZES, unit=UNITS, scope=list(Scope)
)
LENGTHS = [0, 1, 31, 96, 417]


def make(point: dict[str, Any], seed: int = 0) -> tuple[Case, Selection]:
    shape = HeadShape(kv_heads=2, queries_per_kv=point["group"], head_dim=point["head_dim"])
    case = paged_kv(LENGTHS, shape, point["page_size"], point["dtype"], seed)
    unit = min(point["unit"], 32) if point["page_size"] == 96 else min(point["unit"], point["page_size"])
    return case, random_selection(case, shape.selection_heads(point["scope"]), unit, seed)


def run(case: Case, selection: Selection) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attended = torch.empty_like(selection.count)
    out, lse = ops.attend(case.query, case.kv, case.table, selection, case.scale, attended=attended)
    return out, lse, attended


@cache
def expected(
    index: int, layout: Layout
) -> tuple[Case, Selection, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The case of a grid point, and what fp64 and torch make of it: out and lse of both, tokens attended."""
    case, selection = make(GRID[index], seed=index)
    counted = torch.empty_like(selection.count)
    arguments = case.query, case.kv, case.table, selection, case.scale
    out, lse = reference.attend(*arguments, attended=counted, dtype=torch.float64)
    return case, selection, out, lse, torch_attend(case, selection), reference.attend(*arguments)[1], counted


@pytest.mark.parametrize("index", range(len(GRID)), ids=lambda index: "-".join(map(str, GRID[index].values())))
def test_against_fp64(index: int, isa: str) -> None:
    case, selection, exact, exact_lse, peer, peer_lse, counted = expected(index, target.layout())
    out, lse, attended = run(case, selection)
    assert torch.equal(attended, counted)
    assert_as_exact(out, exact, peer, terms=max(LENGTHS))
    logit = 2 * case.scale * case.shape.head_dim  # |q| is about 2 and |k| about 1 in every dim
    assert_as_exact(lse, exact_lse, peer_lse, terms=case.shape.head_dim, magnitude=logit)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and (attended[0] == 0).all()


@pytest.mark.parametrize("point", sample_grid(6, dtype=DTYPES, head_dim=[64, 80], group=[1, 4], page_size=[64, 128],
                                              unit=[1, 16, 32], scope=list(Scope)), ids=str)  # fmt: skip
@pytest.mark.parametrize("poison", [torch.nan, 1e4])
def test_unselected_tokens_have_no_influence(point: dict[str, Any], poison: float, isa: str) -> None:
    case, selection = make(point)
    clean = run(case, selection)
    for row, length in enumerate(LENGTHS):
        unused = ~reference.attended_tokens(selection, row, length)
        heads = unused.repeat_interleave(case.shape.query_heads // len(unused), 0)  # [Hq, length]
        nobody = heads.view(case.shape.kv_heads, case.shape.queries_per_kv, length).all(1)  # [H, length]
        for head, token in nobody.nonzero().tolist():
            page = case.pages[row, token // case.kv.page_size]
            for half in (case.kv.key, case.kv.value):
                half[page, head, token % case.kv.page_size] = poison
    for one, other in zip(run(case, selection), clean, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("point", GRID[:4], ids=str)
def test_a_number_that_is_none_is_not_hidden(point: dict[str, Any], isa: str) -> None:
    case, _ = make(point)
    everything = Selection.empty(len(LENGTHS), 1, 0, 32)
    everything.spans.copy_(case.seq_lens[:, None, None])
    clean, last = run(case, everything), len(LENGTHS) - 1
    case.kv.key[case.pages[last, 0], 0, 5] = torch.nan
    out, lse, _ = run(case, everything)
    mine = slice(0, case.shape.queries_per_kv)
    assert out[last, mine].isnan().all() and lse[last, mine].isnan().all()
    assert torch.equal(out[:last], clean[0][:last]) and torch.equal(lse[:last], clean[1][:last])


@pytest.mark.parametrize("point", GRID[:4], ids=str)
def test_rows_are_independent(point: dict[str, Any], isa: str) -> None:
    case, selection = make(point)
    whole = run(case, selection)
    backwards = torch.arange(len(LENGTHS) - 1, -1, -1)
    for order in (backwards, *(torch.tensor([row]) for row in range(len(LENGTHS)))):
        part = replace(case, query=case.query[order], pages=case.pages[order], seq_lens=case.seq_lens[order])
        chosen = Selection(selection.spans[order], selection.units[order], selection.count[order],
                           selection.unit_tokens)  # fmt: skip
        for one, other in zip(run(part, chosen), whole, strict=True):
            assert torch.equal(one, other[order])


def test_threads_and_repetition_change_nothing(isa: str) -> None:
    case, selection = make(GRID[0])
    clean = run(case, selection)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            for one, other in zip(run(case, selection), clean, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_physical_pages_change_nothing(isa: str) -> None:
    shape = HeadShape(kv_heads=2, queries_per_kv=4, head_dim=64)
    results = []
    for order in (0, 1):
        case = paged_kv(LENGTHS, shape, 64, torch.bfloat16, page_order=order)
        results.append(run(case, random_selection(case, 2, 16)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_long_rows_are_cut_and_merged(isa: str) -> None:
    shape = HeadShape(kv_heads=1, queries_per_kv=2, head_dim=64)
    case = paged_kv([5000, 300], shape, 128, torch.float32)
    selection = Selection.empty(2, 1, 1, 32)
    selection.spans[:] = case.seq_lens[:, None, None]
    out, lse, attended = run(case, selection)
    arguments = case.query, case.kv, case.table, selection, case.scale
    exact, exact_lse = reference.attend(*arguments, dtype=torch.float64)
    _, peer_lse = reference.attend(*arguments)
    assert_as_exact(out, exact, torch_attend(case, selection), terms=5000)
    assert_as_exact(lse, exact_lse, peer_lse, terms=64)
    assert attended.flatten().tolist() == [5000, 300]


def test_rows_that_select_nothing_read_nothing(isa: str) -> None:
    """Without slots, under one head for all; a row of everything stays as it is beside them."""
    lengths, shape = [417, 0, 96, 5000], HeadShape(kv_heads=2, queries_per_kv=3, head_dim=64)
    case = paged_kv(lengths, shape, 64, torch.bfloat16)
    everything, some = (Selection.empty(len(lengths), 1, 0, 16) for _ in range(2))
    everything.spans[:] = case.seq_lens[:, None, None]
    some.spans.copy_(everything.spans)
    nothing = torch.tensor([True, True, False, True])
    some.spans[nothing, :, 0] = 0
    dense = run(case, everything)
    pages = case.pages.clone()
    pages[nothing] = 1 << 30  # in no pool: a read would be the end of the process
    out, lse, attended = run(replace(case, pages=pages), some)
    assert (out[nothing] == 0).all() and (lse[nothing] == -torch.inf).all() and not attended[nothing].any()
    for found, full in zip((out, lse, attended), dense, strict=True):
        assert torch.equal(found[~nothing], full[~nothing])
    plain = reference.attend(case.query, case.kv, case.table, some, case.scale)
    assert (plain[0][nothing] == 0).all() and torch.equal(plain[1] == -torch.inf, lse == -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores_stay_finite(dtype: torch.dtype, isa: str) -> None:
    case = paged_kv([200], HeadShape(1, 2, 64), 64, dtype)
    case.query.mul_(100)
    selection = Selection.empty(1, 1, 1, 32)
    selection.spans[:] = 200
    arguments = case.query, case.kv, case.table, selection, case.scale
    exact, exact_lse = reference.attend(*arguments, dtype=torch.float64)
    _, peer_lse = reference.attend(*arguments)
    out, lse, _ = run(case, selection)
    # exp turns an absolute error of a score into a relative one of its weight.
    logit = exact_lse.abs().max().item()
    assert_as_exact(out, exact, torch_attend(case, selection), terms=64, magnitude=logit * exact.abs().max().item())
    assert_as_exact(lse, exact_lse, peer_lse, terms=64)


def test_strided_query_and_out(isa: str) -> None:
    case, selection = make(GRID[3])
    narrow, _, _ = run(case, selection)
    rows, heads, dim = case.query.shape
    wide = torch.full((rows, 3, heads, dim), torch.nan, dtype=case.query.dtype)
    wide[:, 1] = case.query
    out, _ = ops.attend(wide[:, 1], case.kv, case.table, selection, case.scale, out=torch.zeros_like(wide)[:, 2])
    assert torch.equal(out, narrow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: {"kv": PagedKV(case.kv.key.contiguous(), case.kv.value)}, "key.stride"),
        (lambda case: {"kv": PagedKV(case.kv.key, case.kv.value.mT.contiguous().mT)}, "value.stride"),
        (lambda case: {"kv": PagedKV(case.kv.key.float(), case.kv.value)}, "dtype"),
        (lambda case: {"pages": case.pages.long()}, "pages must be"),
        (lambda case: {"seq_lens": case.seq_lens + 10**6}, "does not fit"),
        (lambda case: {"query": case.query[:, :3]}, "cannot share"),
        (lambda case: {"query": case.query.double()}, "query must be"),
    ],
)
def test_wrong_arguments_are_named(change: Any, message: str) -> None:
    case = paged_kv([40, 70], HeadShape(2, 2, 64), 64, torch.bfloat16)
    selection = random_selection(case, 2, 32)
    with pytest.raises(RuntimeError, match=message):
        run(replace(case, **change(case)), selection)


def test_opcheck() -> None:
    case = paged_kv([40, 70], HeadShape(2, 2, 64), 64, torch.bfloat16)
    s = random_selection(case, 2, 32)
    outputs = torch.empty_like(case.query), torch.empty(2, 4), torch.empty_like(s.count)
    inputs = (case.query, case.kv.key, case.kv.value, case.pages, case.seq_lens, s.spans, s.units, s.count, 32, 0.125)
    torch.library.opcheck(torch.ops.sparseserve.attend.default, (*inputs, *outputs), test_utils=OPCHECKS)
