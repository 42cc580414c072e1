"""summarize_pages: bit for bit the reference, however the tokens come in."""

from typing import Any

import pytest
import torch

from sparseserve import ops, reference
from sparseserve.testing.cases import DTYPES, HEAD_DIMS, OPCHECKS, sample_grid
from sparseserve.types import Bound

GRID = sample_grid(12, dtype=DTYPES, head_dim=HEAD_DIMS, unit=[1, 16, 32, 64], bound=list(Bound))
PAGE_SIZE, HEADS, POOL = 64, 3, 7


def make(point: dict[str, Any], tokens: int = 150) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, their slots (with padding), and an empty pool of summaries with wide pages."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(tokens, HEADS, point["head_dim"], generator=generator).to(point["dtype"])
    pages = torch.randperm(POOL, generator=generator)
    token = torch.arange(tokens)
    slots = pages[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
    return key, slots, empty(point)


def empty(point: dict[str, Any]) -> torch.Tensor:
    units, dim = PAGE_SIZE // point["unit"], point["head_dim"]
    return torch.full((POOL, HEADS * units * 2 * dim + 32), torch.nan)[:, :-32].view(POOL, HEADS, units, 2, dim)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise, NaN included."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_equals_reference(point: dict[str, Any], isa: str) -> None:
    key, slots, summary = make(point)
    slots[[77, 149]] = -1
    key, slots = torch.cat([key[5:6], key]), torch.cat([torch.tensor([-1]), slots])
    expected = empty(point)
    ops.summarize_pages(key, slots, summary, point["unit"], point["bound"])
    reference.summarize_pages(key, slots, expected, point["unit"], point["bound"])
    assert equal(summary, expected)


@pytest.mark.parametrize("point", GRID[:6], ids=lambda point: "-".join(map(str, point.values())))
@pytest.mark.parametrize("chunk", [1, 13, 64])
def test_chunks_equal_one_prefill(point: dict[str, Any], chunk: int, isa: str) -> None:
    key, slots, whole = make(point)
    ops.summarize_pages(key, slots, whole, point["unit"], point["bound"])
    pieces = empty(point)
    for keys, at in zip(key.split(chunk), slots.split(chunk), strict=True):
        ops.summarize_pages(keys, at, pieces, point["unit"], point["bound"])
    assert equal(pieces, whole)


def test_interleaved_rows_equal_separate_ones(isa: str) -> None:
    point = GRID[0]
    key, slots, separate = make(point, tokens=128)
    ops.summarize_pages(key, slots, separate, point["unit"], point["bound"])
    woven = torch.arange(128).view(2, 64).T.flatten()
    together = empty(point)
    ops.summarize_pages(key[woven], slots[woven], together, point["unit"], point["bound"])
    assert equal(together, separate)


def test_a_reused_page_starts_afresh(isa: str) -> None:
    for bound in Bound:
        point = GRID[0] | {"bound": bound, "unit": 16}
        key, slots, clean = make(point, tokens=20)
        used = torch.full_like(clean, 1e4)
        ops.summarize_pages(key, slots, clean, 16, bound)
        ops.summarize_pages(key, slots, used, 16, bound)
        page = int(slots[0]) // PAGE_SIZE
        assert equal(used[page, :, :2], clean[page, :, :2]) and (used[page, :, 2:] == 1e4).all()


def test_all_instruction_sets_agree(isa: str) -> None:
    for point in GRID:
        key, slots, summary = make(point)
        ops.summarize_pages(key, slots, summary, point["unit"], point["bound"])
        other = empty(point)
        ops.use_isa("portable")
        ops.summarize_pages(key, slots, other, point["unit"], point["bound"])
        ops.use_isa(isa)
        assert equal(summary, other)


def test_strided_keys() -> None:
    point = GRID[0]
    key, slots, summary = make(point)
    fused = torch.zeros(len(key), 3 * HEADS, key.shape[2], dtype=key.dtype)
    fused[:, HEADS : 2 * HEADS] = key
    other = empty(point)
    ops.summarize_pages(key, slots, summary, point["unit"], point["bound"])
    ops.summarize_pages(fused[:, HEADS : 2 * HEADS], slots, other, point["unit"], point["bound"])
    assert equal(summary, other)


def test_a_slot_outside_the_pool_is_refused() -> None:
    key, slots, summary = make(GRID[0])
    with pytest.raises(RuntimeError, match="lies outside"):
        ops.summarize_pages(key, slots + POOL * PAGE_SIZE, summary, GRID[0]["unit"], Bound.MIN_MAX)


def test_opcheck() -> None:
    key, slots, summary = make(GRID[0])
    inputs = key, slots, summary, GRID[0]["unit"], 1
    torch.library.opcheck(torch.ops.sparseserve.summarize_pages.default, inputs, test_utils=OPCHECKS)
