"""summarize_gates and score_gates: against fp64, and bit for bit the same however a row comes to be."""

from typing import Any

import pytest
import torch

from sparseserve import ops, reference
from sparseserve.reference import gate as formulas
from sparseserve.testing.cases import DTYPES, HEAD_DIMS, OPCHECKS, Case, paged_kv, sample_grid
from sparseserve.testing.gates import plain_rope
from sparseserve.testing.oracle import assert_as_exact
from sparseserve.types import Gate, HeadShape, PageTable

GRID = sample_grid(16, dtype=DTYPES, head_dim=HEAD_DIMS, group=[1, 4, 5, 8], dim=[16, 48, 64, 128], page_size=[64, 128],
                   unit=[16, 32, 64], norm=[True, False], rope=[True, False])  # fmt: skip
PUBLISHED = {"dtype": torch.bfloat16, "head_dim": 128, "group": 4, "dim": 128, "page_size": 128, "unit": 64,
             "norm": True, "rope": True}  # fmt: skip
LENGTHS = [0, 1, 63, 64, 65, 128, 700]
AT_64 = {**PUBLISHED, "head_dim": 32, "dim": 48}


def name(point: dict[str, Any]) -> str:
    return "-".join(map(str, point.values()))


def random_gate(point: dict[str, Any], heads: int = 2, positions: int = 1024) -> Gate:
    """Weights of the size that keeps logits of the order of 1."""
    generator = torch.Generator().manual_seed(1)
    dims, dim = point["head_dim"], point["dim"]

    def draw(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(shape, generator=generator) / dims**0.5
        return drawn

    query_norm, key_norm = (1 + draw(dim), 1 + draw(dim)) if point["norm"] else (None, None)
    return Gate(
        draw(heads, point["group"], dims, dim),
        draw(heads, 3 * dims, dim),
        query_norm,
        key_norm,
        plain_rope(positions, dims),
        plain_rope(positions, dim) if point["rope"] else None,
    )


def make(point: dict[str, Any], lengths: list[int] = LENGTHS, heads: int = 2) -> tuple[Case, Gate]:
    shape = HeadShape(heads, point["group"], point["head_dim"])
    case = paged_kv(lengths, shape, point["page_size"], point["dtype"])
    return case, random_gate(point | {"head_dim": case.shape.head_dim}, heads)


def empty(case: Case, point: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Summaries of NaN in pages that are wider than they need to be."""
    heads, units, dim = case.shape.kv_heads, point["page_size"] // point["unit"], point["dim"]
    memory = torch.full((len(case.kv.key), heads * units * dim + 48), torch.nan, dtype=dtype)
    return memory[:, :-48].view(-1, heads, units, dim)


def summarize(case: Case, gate: Gate, point: dict[str, Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """By the kernel, or by the reference in `dtype`."""
    summary = empty(case, point, dtype or torch.float32)
    for row in range(len(case.seq_lens)):
        if dtype is None:
            ops.summarize_gates(case.kv.key, *case.slots(row), gate, summary)
        else:
            reference.summarize_gates(case.kv.key, *case.slots(row), gate, summary, dtype=dtype)
    return summary


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise, NaN included."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("point", [*GRID, PUBLISHED], ids=name)
def test_summaries_against_fp64(point: dict[str, Any], isa: str) -> None:
    case, gate = make(point)
    exact, peer = summarize(case, gate, point, torch.float64), summarize(case, gate, point, torch.float32)
    actual = summarize(case, gate, point)
    assert torch.equal(actual.isnan(), exact.isnan())  # incomplete units and unused pages are left alone
    written = ~exact.isnan()
    assert_as_exact(actual[written], exact[written], peer[written], terms=3 * case.shape.head_dim, magnitude=4.0)


@pytest.mark.parametrize("point", [*GRID, PUBLISHED], ids=name)
def test_scores_against_fp64(point: dict[str, Any], isa: str) -> None:
    case, gate = make(point)
    arguments = summarize(case, gate, point), case.table, point["unit"], gate
    exact = reference.score_gates(case.query, *arguments, dtype=torch.float64)
    peer = reference.score_gates(case.query, *arguments)
    magnitude = exact[exact.isfinite()].abs().max().item()
    terms = point["group"] * case.shape.head_dim + point["dim"]
    assert_as_exact(ops.score_gates(case.query, *arguments), exact, peer, terms=terms, magnitude=magnitude)


def test_pooling_is_maximum_minimum_mean_of_the_keys_before_rotation(isa: str) -> None:
    """A gate that passes one pooled feature at a time: the order is [max, min, mean]."""
    point = {**AT_64, "dtype": torch.float32, "norm": False, "rope": False}
    case, gate = make(point, [200])
    point["dim"] = features = 3 * case.shape.head_dim
    gate = Gate(gate.query, torch.eye(features).repeat(2, 1, 1), None, None, gate.unrope, None)
    summary = summarize(case, gate, point)
    keys = reference.paging.row_tokens(case.kv.key, case.pages[0], 192).float()
    plain = formulas.unrotate(keys, gate.unrope[:192]).unflatten(1, (3, 64))  # [H, units, 64, D]
    expected = torch.cat([plain.amax(2), plain.amin(2), plain.mean(2)], -1)
    torch.testing.assert_close(reference.paging.row_units(summary, case.pages[0], 3), expected)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128])
@pytest.mark.parametrize("chunk", [1, 13, 64, 65])
def test_decoded_blocks_equal_prefilled_ones(length: int, chunk: int, isa: str) -> None:
    case, gate = make(AT_64, [length])
    whole, grown = empty(case, AT_64), empty(case, AT_64)
    ops.summarize_gates(case.kv.key, *case.slots(0), gate, whole)
    for at, positions in zip(*(part.split(chunk) for part in case.slots(0)), strict=True):
        ops.summarize_gates(case.kv.key, at, positions, gate, grown)
    assert equal(whole, grown)
    assert int((~whole.isnan()).all(-1).sum()) == length // 64 * 2  # units of two heads


def test_padding_and_other_rows_change_nothing(isa: str) -> None:
    case, gate = make(AT_64, [200, 130])
    apart, together = summarize(case, gate, AT_64), empty(case, AT_64)
    (first, at_first), (second, at_second) = case.slots(0), case.slots(1)
    padding = torch.tensor([-1])
    mixed = torch.cat([padding, second[100:], first, padding, second[:100], padding])
    positions = torch.cat([padding, at_second[100:], at_first, padding, at_second[:100], padding])
    ops.summarize_gates(case.kv.key, mixed, positions, gate, together)
    assert equal(apart, together)


def test_all_instruction_sets_give_the_same_bits(cpu_isa: str) -> None:
    for point in [*GRID, PUBLISHED]:
        case, gate = make(point, [200])
        summary = summarize(case, gate, point)
        ops.use_isa("portable")
        portable = summarize(case, gate, point)
        ops.use_isa(cpu_isa)
        assert equal(summary, portable)


def test_the_softmax_counts_an_incomplete_block_as_zero(isa: str) -> None:
    case, gate = make(AT_64, [256, 257])
    summary = summarize(case, gate, AT_64)
    scores = ops.score_gates(case.query, summary, case.table, 64, gate)
    assert scores[0, :, 3].isposinf().all() and scores[1, :, 4].isposinf().all()
    shares = scores.exp()
    assert (shares[0, :, :3].sum(1) < 1).all()  # the last, complete block has the rest
    missing = 1 - shares[1, :, :4].double().sum(1)  # the share of a logit of 0
    whole = reference.score_gates(case.query, summary, case.table, 64, gate, dtype=torch.float64)
    torch.testing.assert_close(missing, 1 - whole[1, :, :4].exp().sum(1), rtol=1e-4, atol=1e-6)
    assert (missing > 0).all()


def test_units_beyond_the_row_are_untouched(isa: str) -> None:
    case, gate = make(AT_64)
    scores = torch.full((len(LENGTHS), 2, 20), -7.0)
    ops.score_gates(case.query, summarize(case, gate, AT_64), case.table, 64, gate, scores=scores)
    for row, length in enumerate(LENGTHS):
        used = -(-length // 64)
        assert (scores[row, :, used:] == -7).all() and not scores[row, :, :used].isnan().any()


def test_rows_and_threads_change_nothing(isa: str) -> None:
    case, gate = make(PUBLISHED)
    arguments = summarize(case, gate, PUBLISHED), case.table, 64, gate
    clean = ops.score_gates(case.query, *arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(ops.score_gates(case.query, *arguments), clean)
    torch.set_num_threads(threads)
    row = slice(6, 7)
    alone = ops.score_gates(case.query[row], arguments[0], PageTable(case.pages[row], case.seq_lens[row]), 64, gate)
    assert torch.equal(alone, clean[row])


def test_wrong_inputs_are_refused() -> None:
    case, gate = make(AT_64, [128])
    summary = empty(case, AT_64)
    at, positions = case.slots(0)
    with pytest.raises(RuntimeError, match="lies outside"):
        ops.summarize_gates(case.kv.key, at + summary.shape[0] * 128, positions, gate, summary)
    with pytest.raises(RuntimeError, match="ends no block"):
        ops.summarize_gates(case.kv.key, at, positions - 64, gate, summary)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        ops.summarize_gates(case.kv.key, at, positions, gate, summary.repeat(1, 1, 8, 1))
    with pytest.raises(RuntimeError, match="positions of unrope"):
        short = random_gate(AT_64, positions=127)
        ops.score_gates(case.query, summary, case.table, 64, short)


def test_opcheck() -> None:
    case, gate = make(AT_64, [128])
    summary = empty(case, AT_64)
    written = case.kv.key, *case.slots(0), gate.key, gate.key_norm, gate.unrope, gate.rope, summary
    torch.library.opcheck(torch.ops.sparseserve.summarize_gates.default, written, test_utils=OPCHECKS)
    scored = (case.query, summary, case.pages, case.seq_lens, 64, gate.query, None, gate.unrope, None,
              torch.zeros(1, 2, 2))  # fmt: skip
    torch.library.opcheck(torch.ops.sparseserve.score_gates.default, scored, test_utils=OPCHECKS)
