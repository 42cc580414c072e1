"""write_tokens: every head's keys and values where its table says, and nothing else touched."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve import ops, reference
from sparseserve.testing import target
from sparseserve.testing.cases import DTYPES, HEAD_DIMS, OPCHECKS, PAGE_SIZES, sample_grid
from sparseserve.types import HeadShape, PagedKV

TABLES, SLOTS, PAGES = 3, 2, 40
PLACES = torch.tensor([[0, 0], [2, 1], [0, 1], [1, 0]], dtype=torch.int32)
GRID = sample_grid(9, dtype=DTYPES, head_dim=HEAD_DIMS, page_size=PAGE_SIZES, tokens=[0, 1, 5, 200])


def pool(point: dict[str, Any]) -> PagedKV:
    """Pages of NaN, wider than they need to be."""
    shape, dtype = target.fitting(HeadShape(SLOTS, 1, point["head_dim"]), point["dtype"])
    memory = torch.full((PAGES, SLOTS * point["page_size"] * 2 * shape.head_dim + 64), torch.nan, dtype=dtype)
    kv = target.views(target.cache(memory, shape, point["page_size"]))
    return PagedKV(kv.key, kv.value, PLACES)


def tokens(point: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in the middle of wider rows; runs of slots that begin anywhere, with padding between them."""
    draw = torch.Generator().manual_seed(point["tokens"])
    size, count = point["page_size"], point["tokens"]
    shape, dtype = target.fitting(HeadShape(len(PLACES) + 2, 1, point["head_dim"]), point["dtype"])
    wide = torch.randn(2, count, shape.kv_heads, shape.head_dim, generator=draw).to(dtype)
    slots = torch.full((TABLES, count + 3), -1)
    # No page is in two tables, as vLLM hands them out: two writes to one slot would have no order.
    owned = torch.randperm(PAGES, generator=draw).split(-(-(count + 5) // size))
    for table in range(TABLES):
        of_table = (owned[table][:, None] * size + torch.arange(size)).flatten()
        slots[table, :count] = of_table[table : table + count]
        slots[table, torch.rand(count + 3, generator=draw) < 0.1] = -1
    return wide[0, :, 1:-1], wide[1, :, 1:-1], slots


def same(one: PagedKV, other: PagedKV) -> bool:
    pairs = (one.key, other.key), (one.value, other.value)
    return all(torch.equal(mine.nan_to_num(7), its.nan_to_num(7)) for mine, its in pairs)


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_against_the_reference(point: dict[str, Any], isa: str) -> None:
    key, value, slots = tokens(point)
    written, expected = pool(point), pool(point)
    ops.write_tokens(key, value, slots, written)
    reference.write_tokens(key, value, slots, expected)
    assert same(written, expected)
    assert written.key.isnan().any() and (written.key.isnan() == written.value.isnan()).all()


def test_wrong_arguments_are_named(cpu_isa: str) -> None:
    point = {"dtype": torch.bfloat16, "head_dim": 64, "page_size": 64, "tokens": 5}
    key, value, slots = tokens(point)
    kv = pool(point)
    for changed, name in [
        ((key, value[:3], slots, kv), "value"),
        ((key.float(), value, slots, kv), "key"),
        ((key, value, slots[:, :4], kv), "slots"),
        ((key, value, slots[:2], kv), "places"),
        ((key[:, :3], value[:, :3], slots, kv), "places"),
    ]:
        with pytest.raises(RuntimeError, match=name):
            ops.write_tokens(*changed)


def test_the_schema_is_honest() -> None:
    point = {"dtype": torch.bfloat16, "head_dim": 64, "page_size": 64, "tokens": 5}
    kv = pool(point)
    arguments = *tokens(point), kv.key, kv.value, kv.places
    torch.library.opcheck(torch.ops.sparseserve.write_tokens.default, arguments, test_utils=OPCHECKS)
