"""hip beyond the laws: its hyper-parameters, and what it remembers from step to step."""

from typing import Any

import pytest
import torch

from sparseserve.config import from_dict, load_policy, to_dict
from sparseserve.errors import ConfigError
from sparseserve.model import ModelShape
from sparseserve.policies import Hip
from sparseserve.testing.bed import Bed, Outcome
from sparseserve.types import HeadShape, NewTokens, Scope

SMALL: dict[str, Any] = {
    "sink_tokens": 8,
    "recent_tokens": 19,
    "budget_tokens": 96,
    "wide_layers": 1,
    "wide_budget_tokens": 128,
    "chunk_tokens": (32, 16, 8),
    "stage_tokens": (256, 128),
}
MODEL = ModelShape(
    "bed", layers=2, heads=HeadShape(kv_heads=2, queries_per_kv=2, head_dim=32), max_len=512, page_size=64
)
LENGTH = 400  # 16 tokens into a page


def data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [L, B, Hq, D], key and value [L, B, T, H, D]."""
    random = torch.Generator().manual_seed(seed)
    heads = MODEL.heads
    query = torch.randn(MODEL.layers, rows, heads.query_heads, heads.head_dim, generator=random)
    key, value = torch.randn(2, MODEL.layers, rows, MODEL.max_len, heads.kv_heads, heads.head_dim, generator=random)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def step(bed: Bed, tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rows: list[int]) -> Outcome:
    """Write the next token of `rows` and decode it, with a query of its own."""
    query, key, value = tokens
    for row in rows:
        at = bed.lengths[row]
        for layer in range(MODEL.layers):
            bed.write(layer, row, at, key[layer, row, at : at + 1], value[layer, row, at : at + 1])
        bed.lengths[row] += 1
    lengths = torch.tensor([bed.lengths[row] for row in range(len(bed.lengths))])
    return bed.decode((query * lengths[None, :, None, None].sin()).bfloat16(), rows)


def units(outcome: Outcome, row: int = 0, layer: int = 1) -> list[int]:
    selection = outcome.selections[layer]
    found: list[int] = selection.units[row, 0, : selection.count[row, 0]].tolist()
    return found


def test_the_first_layers_have_their_own_budget() -> None:
    policy = Hip(**SMALL)
    wide, narrow = policy.plans(MODEL)
    assert wide.budget is not None and narrow.budget is not None
    assert wide.budget.tolist() == [128] and narrow.budget.tolist() == [96]
    assert [policy.expected_tokens(plan, 4000) for plan in (wide, narrow)] == [128, 96]
    assert policy.selection_units(4000) == (128 - 8 - 19) // 8
    outcome = Bed(policy, MODEL, [LENGTH]).fill(*data(1)[1:]).decode(data(1)[0])
    assert [selection.count.item() for selection in outcome.selections] == [12, 8]


def test_units_are_found_again_when_a_refresh_is_due() -> None:
    tokens = data(1)
    bed = Bed(Hip(**SMALL, refresh_steps=(16, 8, 4)), MODEL, [LENGTH]).fill(*tokens[1:])
    found = [units(step(bed, tokens, [0])) for _ in range(32)]  # offsets 16 to 47
    changed = [offset for offset, (a, b) in enumerate(zip(found, found[1:], strict=False), 17) if a != b]
    assert changed and all(offset % 4 == 0 for offset in changed)


def test_rows_that_come_and_go_do_not_change_the_others() -> None:
    tokens = data(3)
    lengths = [LENGTH, 200, 333]
    shared, alone = (Bed(Hip(**SMALL), MODEL, list(lengths)).fill(*tokens[1:]) for _ in range(2))
    for count in range(40):
        rows = [row for row in (2, 0, 1) if row == 0 or count % (3 + row)]
        together = step(shared, tokens, rows)
        for at, row in enumerate(rows):
            assert torch.equal(step(alone, tokens, [row]).out[:, 0], together.out[:, at])


def test_a_reissued_page_forgets_its_search() -> None:
    query, key, value = data(1)
    fresh = Bed(Hip(**SMALL), MODEL, [LENGTH]).fill(key, value).decode(query)
    used = Bed(Hip(**SMALL), MODEL, [LENGTH - 3]).fill(key.flip(2), value.flip(2))
    other = used.decode(query)
    assert units(other) != units(fresh)
    used.lengths = [LENGTH]
    assert torch.equal(used.fill(key, value).decode(query).out, fresh.out)


def test_only_pages_that_begin_forget() -> None:
    policy = Hip(**SMALL)
    layer = Bed(policy, MODEL, [1] * 6).layers[0]
    layer.state.fill_(1)
    slots = torch.tensor([2 * 64, 3 * 64 + 1, -1, 5 * 64])
    policy.update_pages(layer, NewTokens(slots, torch.arange(4)))
    assert (layer.state[:, 0, 0] == 0).nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize(("scope", "heads"), [("all_heads", 1), ("kv_head", 4)])
def test_the_state_of_a_page_is_a_few_percent_of_it(scope: Any, heads: int) -> None:
    policy, shape = Hip(scope=scope), HeadShape(kv_heads=4, queries_per_kv=2, head_dim=64)
    assert policy.head_scope is Scope(scope)
    page = 2 * 2 * 128 * shape.kv_heads * shape.head_dim  # bytes in bf16
    assert 0.02 * heads < policy.page_state_bytes(shape, 128, 2) / page < 0.03 * heads
    assert policy.page_state_bytes(shape, 128, 2) % 64 == 0


def test_lists_come_from_flags_and_travel() -> None:
    flags = ["chunk_tokens=[128,32,8]", "refresh_steps=[96,24,8]", "scope=kv_head"]
    policy = load_policy("hip", flags, {}, "model")
    assert policy == Hip(chunk_tokens=(128, 32, 8), refresh_steps=(96, 24, 8), scope="kv_head")
    assert from_dict(to_dict(policy)) == policy


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["chunk_tokens=[256,0,8]"], ["chunk_tokens.1 = 0", "--set chunk_tokens="]),
        (["chunk_tokens=[256,8]"], ["chunk_tokens.2 is missing", "--set chunk_tokens="]),
        (["chunk_tokens=8"], ["chunk_tokens = 8", "tuple"]),
        (["chunk_tokens=[256,24,8]"], ["[256, 24, 8]", "powers of two"]),
        (["chunk_tokens=[8,32,256]"], ["[8, 32, 256]", "descend"]),
        (["chunk_tokens=[256,128,64]"], ["at most 32"]),
        (["stage_tokens=[32768,8200]"], ["[32768, 8200]", "multiples of chunk_tokens"]),
        (["stage_tokens=[8192,32768]"], ["[8192, 32768]", "descend"]),
        (["stage_tokens=[32768,2048]"], ["4096 tokens"]),
        (["sink_tokens=12"], ["sink_tokens = 12", "multiple of 8"]),
        (["budget_tokens=6000"], ["wide_budget_tokens = 5376", "wide_layers=0"]),
        (["scope=query_head"], ["scope = query_head", "all_heads, kv_head"]),
    ],
)
def test_bad_values_are_explained(flags: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_policy("hip", flags, {}, "model")
    assert [words for words in told if words not in str(error.value)] == []


def test_without_wide_layers_their_budget_does_not_count() -> None:
    policy = Hip(wide_layers=0, budget_tokens=6000)
    assert policy.selection_units(99999) == (6000 - 256 - 1024) // 8


def test_more_wide_layers_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="wide_layers = 4 .*at most 2"):
        Hip().plans(MODEL)
