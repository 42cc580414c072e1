"""attend where every KV head has a page table and a slot of its own: the same bits, wherever the heads lie."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve import ops, reference
from sparseserve.testing import target
from sparseserve.testing.cases import (
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    OPCHECKS,
    PAGE_SIZES,
    Case,
    paged_kv,
    random_selection,
    sample_grid,
    scattered,
)
from sparseserve.testing.oracle import assert_as_exact, torch_attend
from sparseserve.testing.target import Layout
from sparseserve.types import HeadShape, Scope, Selection, Window

KV_HEADS = 3
LENGTHS = [0, 1, 31, 96, 257]
GRID = sample_grid(
    9, dtype=DTYPES, head_dim=HEAD_DIMS, group=GROUPS, page_size=PAGE_SIZES, unit=[1, 16, 32], scope=list(Scope)
)


def make(point: dict[str, Any], seed: int = 0, poison: float = torch.nan) -> tuple[Case, Case, Selection]:
    """A plain case, its heads scattered over more slots than heads or over tables with fewer, and a selection."""
    shape = HeadShape(KV_HEADS, point["group"], point["head_dim"])
    plain = paged_kv(LENGTHS, shape, point["page_size"], point["dtype"], seed, poison=poison)
    tables, slots = (1, 5) if point["scope"] is Scope.ALL_HEADS else (4, 2)
    selection = random_selection(plain, shape.selection_heads(point["scope"]), point["unit"], seed)
    return plain, scattered(plain, tables, slots, seed, poison), selection


def run(case: Case, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    attended = torch.empty_like(selection.count)
    out, lse = ops.attend(case.query, case.kv, case.table, selection, case.scale, attended=attended)
    return out, lse, attended


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for mine, its in zip(one, other, strict=True):
        assert torch.equal(mine, its)


@cache
def expected(index: int, layout: Layout) -> tuple[Case, Case, Selection, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `make` gives for a grid point; out and lse in fp64, then by torch; tokens attended."""
    plain, case, selection = make(GRID[index], seed=index)
    counted = torch.empty_like(selection.count)
    arguments = case.query, case.kv, case.table, selection, case.scale
    out, lse = reference.attend(*arguments, attended=counted, dtype=torch.float64)
    return plain, case, selection, out, lse, torch_attend(case, selection), reference.attend(*arguments)[1], counted


@pytest.mark.parametrize("index", range(len(GRID)), ids=lambda index: "-".join(map(str, GRID[index].values())))
def test_where_heads_lie_changes_nothing(index: int, isa: str) -> None:
    plain, case, selection, exact, exact_lse, peer, peer_lse, counted = expected(index, target.layout())
    out, lse, attended = run(case, selection)
    assert_as_exact(out, exact, peer, terms=max(LENGTHS))
    logit = 2 * case.scale * case.shape.head_dim  # |q| is about 2 and |k| about 1 in every dim
    assert_as_exact(lse, exact_lse, peer_lse, terms=case.shape.head_dim, magnitude=logit)
    assert torch.equal(attended, counted)
    assert_same((out, lse, attended), run(plain, selection))


@pytest.mark.parametrize("point", GRID[:3], ids=str)
def test_identity_places_are_no_places(point: dict[str, Any], isa: str) -> None:
    plain, _, selection = make(point)
    places = torch.tensor([[0, head] for head in range(KV_HEADS)], dtype=torch.int32)
    placed = replace(plain, kv=replace(plain.kv, places=places), pages=plain.pages[None])
    assert_same(run(placed, selection), run(plain, selection))


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("poison", [torch.nan, 1e4])
def test_unselected_tokens_slots_and_pages_have_no_influence(scope: Scope, poison: float, isa: str) -> None:
    point = {"dtype": torch.bfloat16, "head_dim": 64, "group": 2, "page_size": 32, "unit": 16, "scope": scope}
    _, clean, selection = make(point, poison=0.0)
    _, case, _ = make(point, poison=poison)
    assert case.kv.places is not None
    nowhere = int(({*range(len(case.kv.key))} - {*case.pages.flatten().tolist()}).pop())  # as vLLM's null block
    case.kv.key[nowhere], case.kv.value[nowhere] = poison, poison
    read = torch.zeros_like(case.pages, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        chosen = reference.attended_tokens(selection, row, length)
        heads = chosen.repeat_interleave(case.shape.query_heads // len(chosen), 0)  # [Hq, length]
        somebody = heads.view(KV_HEADS, case.shape.queries_per_kv, length).any(1)  # [H, length]
        for (table, slot), mine in zip(case.kv.places.tolist(), somebody, strict=True):
            token = torch.arange(length)
            page = token // 32
            read[table, row, page[mine]] = True
            at = case.pages[table, row, page[~mine]], slot, token[~mine] % 32
            case.kv.key[at], case.kv.value[at] = poison, poison
    assert not read.all()
    case = replace(case, pages=case.pages.where(read, nowhere))
    assert_same(run(case, selection), run(clean, selection))


@pytest.mark.parametrize("point", GRID[:3], ids=str)
def test_rows_are_independent(point: dict[str, Any], isa: str) -> None:
    _, case, selection = make(point)
    whole = run(case, selection)
    backwards = torch.arange(len(LENGTHS) - 1, -1, -1)
    for order in (backwards, *(torch.tensor([row]) for row in range(len(LENGTHS)))):
        part = replace(case, query=case.query[order], pages=case.pages[:, order], seq_lens=case.seq_lens[order])
        chosen = Selection(selection.spans[order], selection.units[order], selection.count[order],
                           selection.unit_tokens)  # fmt: skip
        for one, other in zip(run(part, chosen), whole, strict=True):
            assert torch.equal(one, other[order])


def test_rows_that_share_their_pages(isa: str) -> None:
    """As in a prompt: consecutive lengths of one row of every table, every head in a window of its own."""
    rows, shape = 9, HeadShape(KV_HEADS, 2, 64)
    one = scattered(paged_kv([200], shape, 32, torch.bfloat16), tables=2, slots=2)
    query = torch.randn(rows, shape.query_heads, 64, generator=torch.Generator().manual_seed(1)).to(one.query.dtype)
    seq_lens = torch.arange(200 - rows, 200, dtype=torch.int32) + 1
    windows = torch.tensor([[8.0], [40.0], [150.0]], dtype=torch.float64)
    window = Window(torch.tensor([0, 4, 32], dtype=torch.int32), windows, torch.zeros_like(windows))
    selection = replace(Selection.empty(rows, KV_HEADS, 1, 16), spans=window.spans(seq_lens))
    shared = replace(one, query=query, pages=one.pages.expand(-1, rows, -1), seq_lens=seq_lens)
    assert shared.pages.stride(1) == 0
    copied = replace(shared, pages=shared.pages.contiguous())
    out, lse, attended = run(shared, selection)
    assert_same((out, lse, attended), run(copied, selection))
    assert attended.tolist() == [[8, 40, 150]] * rows
    arguments = shared.query, shared.kv, shared.table, selection, shared.scale
    exact, _ = reference.attend(*arguments, dtype=torch.float64)
    assert_as_exact(out, exact, torch_attend(shared, selection), terms=200)


def placed(case: Case, places: Tensor) -> dict[str, Any]:
    return {"kv": replace(case.kv, places=places)}


IDENTITY = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda case: placed(case, IDENTITY + torch.tensor([2, 0], dtype=torch.int32)),
            r"places\[0\]\[0\] = 2 is none",
        ),
        (lambda case: placed(case, IDENTITY - torch.tensor([1, 0], dtype=torch.int32)), r"places\[0\]\[0\] = -1 is"),
        (
            lambda case: placed(case, IDENTITY + torch.tensor([0, 3], dtype=torch.int32)),
            r"places\[1\]\[1\] = 4 is none",
        ),
        (lambda case: placed(case, IDENTITY.long()), "places must be Int"),
        (lambda case: placed(case, IDENTITY.T), "places must be contiguous"),
        (lambda case: placed(case, IDENTITY.flatten()), "places must have 2 dim"),
        (lambda case: placed(case, IDENTITY.repeat(2, 1)[:3]), "cannot share 3 KV heads"),
        (lambda case: {"pages": case.pages[0]}, "pages must have 3 dim"),
        (lambda case: {"pages": case.pages[:, :1]}, r"pages.shape\[1\] must be 2"),
        (lambda case: {"pages": case.pages.repeat(1, 1, 2)[..., ::2]}, r"pages.stride\(2\)"),
        (lambda case: {"kv": replace(case.kv, places=None)}, "pages must have 2 dim"),
        (lambda case: {"seq_lens": case.seq_lens + 10**6}, "does not fit"),
    ],
)
def test_wrong_arguments_are_named(change: Any, message: str) -> None:
    case = scattered(paged_kv([40, 70], HeadShape(2, 2, 64), 64, torch.bfloat16), tables=2, slots=4)
    with pytest.raises(RuntimeError, match=message):
        run(replace(case, **change(case)), random_selection(case, 2, 32))


def test_a_selection_of_all_heads_needs_one_table() -> None:
    case = scattered(paged_kv([40, 70], HeadShape(2, 2, 64), 64, torch.bfloat16), tables=2, slots=4)
    apart = replace(case, **placed(case, torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)))
    with pytest.raises(RuntimeError, match=r"places\[1\]\[0\] = 0 must be 1, .* need 2 selection heads"):
        run(apart, random_selection(apart, 1, 32))


def test_opcheck() -> None:
    case = scattered(paged_kv([40, 70], HeadShape(2, 2, 64), 64, torch.bfloat16), tables=2, slots=4)
    s = random_selection(case, 2, 32)
    outputs = torch.empty_like(case.query), torch.empty(2, 4), torch.empty_like(s.count)
    inputs = (case.query, case.kv.key, case.kv.value, case.pages, case.seq_lens, s.spans, s.units, s.count, 32, 0.125)
    arguments = (*inputs, *outputs, case.kv.places)
    torch.library.opcheck(torch.ops.sparseserve.attend.default, arguments, test_utils=OPCHECKS)
