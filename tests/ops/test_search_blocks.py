"""search_blocks: exactly the reference, on keys and queries of whole numbers, whose products sum without rounding."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve import ops, reference
from sparseserve.reference.attend import attended_tokens
from sparseserve.reference.paging import logits, row_tokens
from sparseserve.reference.search import chunk_scores
from sparseserve.testing.cases import DTYPES, GROUPS, HEAD_DIMS, OPCHECKS, Case, paged_kv, sample_grid
from sparseserve.types import HeadShape, PageTable, Scope, Selection, Wanted

GRID = sample_grid(12, dtype=DTYPES, head_dim=HEAD_DIMS, group=GROUPS, page_size=[32, 96, 128],
                   scope=list(Scope))  # fmt: skip
LENGTHS = [0, 1, 200, 201, 451, 1000]
SHAPE = HeadShape(kv_heads=2, queries_per_kv=2, head_dim=32)
BOTH = pytest.mark.parametrize("function", [ops.search_blocks, reference.search_blocks], ids=["kernel", "reference"])


@dataclass(frozen=True)
class Rules:
    """How a search goes; small, so that every stage drops chunks of a short row."""

    chunk_tokens: tuple[int, int, int] = (64, 16, 8)
    stage_tokens: tuple[int, int] = (512, 128)
    refresh_steps: tuple[int, int, int] = (16, 8, 4)
    sink: int = 8
    recent: int = 100
    budget: int = 200
    row_budget: tuple[int, ...] = ()  # of all rows of the case, if any

    @property
    def lists(self) -> list[int]:
        """Sizes of the lists in the state."""
        kept = [tokens // chunk for tokens, chunk in zip(self.stage_tokens, self.chunk_tokens, strict=False)]
        return [*kept, (max(self.budget, *self.row_budget, 0) - self.sink - self.recent) // self.chunk_tokens[2]]

    def limit(self, length: int) -> int:
        """Chunks start before it."""
        return length - max(0, self.recent - self.chunk_tokens[0])


class Searcher:
    """Searches of one page pool, which remembers them."""

    def __init__(self, function: Callable[..., None], case: Case, heads: int = 1, rules: Rules | None = None) -> None:
        self.function, self.case, self.heads = function, case, heads
        self.rules = rules or Rules()
        self.state = torch.zeros(case.kv.key.shape[0], heads, 4 + sum(self.rules.lists), dtype=torch.int32)

    def __call__(self, lengths: list[int], rows: list[int] | None = None) -> Selection:
        """Searches `rows` (all by default), which then have `lengths` tokens."""
        rows = list(range(len(lengths))) if rows is None else rows
        rules, case = self.rules, self.case
        selection = Selection.empty(len(rows), self.heads, rules.lists[2], rules.chunk_tokens[2])
        sink, recent, budget = (
            torch.full((self.heads,), tokens, dtype=torch.int32) for tokens in (rules.sink, rules.recent, rules.budget)
        )
        own = torch.tensor([rules.row_budget[row] for row in rows], dtype=torch.int32) if rules.row_budget else None
        table = PageTable(case.pages[rows], torch.tensor(lengths, dtype=torch.int32))
        self.function(
            case.query[rows], case.kv.key, table, self.state,
            chunk_tokens=rules.chunk_tokens, stage_tokens=rules.stage_tokens, refresh_steps=rules.refresh_steps,
            wanted=Wanted(selection, sink, recent, budget, row_budget=own),
        )  # fmt: skip
        return selection

    def memory(self, row: int, length: int) -> Tensor:
        """What the page of a row's last token remembers, of the first selection head."""
        return self.state[self.case.pages[row, (length - 1) // self.case.kv.page_size], 0]


def whole_numbers(lengths: list[int], shape: HeadShape = SHAPE, page_size: int = 64,
                  dtype: torch.dtype = torch.bfloat16) -> Case:  # fmt: skip
    case = paged_kv(lengths, shape, page_size, dtype)
    case.kv.key.copy_((case.kv.key * 2).round())  # NaN stays NaN
    return replace(case, query=case.query.round())


def one_dim(scores: Tensor) -> Case:
    """One row whose token t has q.k = scores[t]."""
    case = whole_numbers([len(scores)], HeadShape(1, 1, 16), 128, torch.float32)
    key = torch.zeros(case.pages.numel() * 128, 16)
    key[: len(scores), 0] = scores
    case.kv.key[case.pages[0].long(), 0] = key.view(-1, 128, 16)
    return replace(case, query=torch.eye(16)[:1].view(1, 1, 16))


def units(selection: Selection, row: int = 0, head: int = 0) -> list[int]:
    found: list[int] = selection.units[row, head, : selection.count[row, head]].tolist()
    return found


def assert_same(one: Selection, other: Selection) -> None:
    for name in ("spans", "units", "count"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_equals_reference(point: dict[str, Any], isa: str) -> None:
    shape = HeadShape(kv_heads=2, queries_per_kv=point["group"], head_dim=point["head_dim"])
    steps = 9
    case = whole_numbers([length + steps for length in LENGTHS], shape, point["page_size"], point["dtype"])
    heads = shape.selection_heads(point["scope"])
    kernel, plain = (Searcher(f, case, heads) for f in (ops.search_blocks, reference.search_blocks))
    for step in range(steps):
        lengths = [length + step if length else 0 for length in LENGTHS]
        assert_same(kernel(lengths), plain(lengths))
        assert torch.equal(kernel.state, plain.state)


@pytest.mark.parametrize(
    "rules", [Rules(recent=20), Rules(chunk_tokens=(32, 4, 1), sink=9), Rules(budget=109)], ids=str
)
def test_unusual_rules_equal_reference(rules: Rules) -> None:
    """Chunks that the row's end cuts short, single tokens, no units at all."""
    case = whole_numbers(LENGTHS)
    selections = [Searcher(f, case, 2, rules)(LENGTHS) for f in (ops.search_blocks, reference.search_blocks)]
    assert_same(*selections)
    assert bool(selections[0].count.any()) == (rules.budget > 109)


@pytest.mark.parametrize("seed", range(4))
def test_budgets_of_rows_equal_reference(seed: int, isa: str) -> None:
    """None, less than sink and recent tokens, less and more than the plan's, more than the length."""
    draw = random.Random(seed)
    choices = [0, draw.randint(1, 107), draw.randint(108, 200), draw.randint(201, 600), 2000]
    case = whole_numbers([length + 9 for length in LENGTHS])
    rules = Rules(row_budget=tuple(draw.choices(choices, k=len(LENGTHS))))
    kernel, plain = (Searcher(f, case, 2, rules) for f in (ops.search_blocks, reference.search_blocks))
    for step in range(9):
        lengths = [length + step if length else 0 for length in LENGTHS]
        assert_same(kernel(lengths), plain(lengths))
        assert torch.equal(kernel.state, plain.state)


@BOTH
@pytest.mark.parametrize("budget", [150, 220])
def test_a_budget_of_every_row_is_a_budget(function: Callable[..., None], budget: int) -> None:
    case, lengths = whole_numbers([700, 200]), [700, 200]
    own = Searcher(function, case, rules=Rules(row_budget=(budget, budget)))(lengths)
    plan = Searcher(function, case, rules=Rules(budget=budget))(lengths)
    assert torch.equal(own.spans, plan.spans)
    assert units(own, 0) == units(plan, 0) and units(own, 1) == units(plan, 1)
    assert own.count.flatten().tolist() == [(budget - 108) // 8, 5 if budget == 150 else 0]


@BOTH
def test_sink_and_recent_tokens_are_taken_whatever_the_budget_of_a_row(function: Callable[..., None]) -> None:
    rules = Rules(sink=16, row_budget=(10, 10, 10))
    selection = Searcher(function, whole_numbers([300, 90, 12]), rules=rules)([300, 90, 12])
    assert selection.spans[:, 0].tolist() == [[16, 200], [16, 16], [12, 12]] and not selection.count.any()


@pytest.mark.parametrize("chunk", [8, 32, 256])
def test_the_midpoint_search_finds_peaks_between_even_slopes(chunk: int) -> None:
    token = torch.arange(chunk)
    peaks = -(token[:, None] - token).abs().float()  # row i has its peak at token i
    for dots in (peaks, token.float()[None], -token.float()[None]):
        assert all(chunk_scores(row[None], torch.tensor([0]), chunk) == row.max() for row in dots)


def test_the_midpoint_search_misses_an_uneven_peak() -> None:
    dots = torch.tensor([[3.0, 4, 5, 6, 7, 0, 0, 0]])
    assert chunk_scores(dots, torch.tensor([0]), 8) == 6


def test_equal_halves_go_right() -> None:
    left, right = (torch.nn.functional.one_hot(torch.tensor([token]), 8).float() for token in (1, 5))
    assert chunk_scores(left, torch.tensor([0]), 8) == 0
    assert chunk_scores(right, torch.tensor([0]), 8) == 1


def test_the_score_is_the_largest_probe_on_the_way() -> None:
    dots = torch.tensor([[0.0, 0, 9, 0, 0, 0, 0, 0]])  # found by the first probe, left behind by the later ones
    assert chunk_scores(torch.cat([dots, 10 - dots]), torch.tensor([0]), 8) == 10


def probes(dots: list[float], start: int, end: int) -> set[int]:
    """The tokens whose keys a search of one chunk reads."""
    middle = (start + end) // 2
    low, high = (start + middle) // 2, (middle + end) // 2
    if end - start == 1:
        return {start}
    half = (middle, end) if dots[high] >= dots[low] else (start, middle)
    return {low, high} | probes(dots, *half)


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_that_are_not_probed_have_no_influence(heads: int, isa: str) -> None:
    length, rules = 1000, Rules(stage_tokens=(256, 128))
    case = whole_numbers([length])
    clean = Searcher(ops.search_blocks, case, heads, rules)
    selection = clean([length])
    dots = logits(case.query[0], row_tokens(case.kv.key, case.pages[0], length), 1.0).tolist()
    unread = torch.ones(SHAPE.kv_heads, length, dtype=torch.bool)
    for head in range(SHAPE.query_heads):
        kv_head = head // SHAPE.queries_per_kv
        memory = clean.state[case.pages[0, (length - 1) // 64], kv_head if heads > 1 else 0]
        kept = memory[4:].split(rules.lists)
        parents = [range(rules.sink, rules.limit(length), 64), *(kept[i][: memory[1 + i]].tolist() for i in (0, 1))]
        for of, size, chunk in zip(parents, (64, 64, 16), rules.chunk_tokens, strict=True):
            for start in (start for parent in of for start in range(parent, parent + size, chunk)):
                if start < rules.limit(length):
                    unread[kv_head, list(probes(dots[head], start, min(start + chunk, length)))] = False
    assert 0.3 < unread.float().mean() < 0.9
    for head, token in unread.nonzero().tolist():
        case.kv.key[case.pages[0, token // 64], head, token % 64] = torch.nan
    assert_same(Searcher(ops.search_blocks, case, heads, rules)([length]), selection)


@BOTH
def test_what_a_step_searches_again(function: Callable[..., None]) -> None:
    rules = Rules()
    search = Searcher(function, whole_numbers([512]), rules=rules)
    for length in range(385, 449):  # one page
        # Each list names another place: what is found tells where the search began.
        memory = search.memory(0, length)
        memory[0], memory[1:4] = length - 1 if length > 385 else 0, 1
        places = [8 + 64, 8 + 2 * 64, 8 + 3 * 64]
        for start, to in zip(places, memory[4:].split(rules.lists), strict=True):
            to[0] = start
        found = [unit * 8 for unit in units(search([length]))]
        offset = length - 385
        stage = next((i for i, steps in enumerate(rules.refresh_steps) if offset % steps == 0), 3)
        if stage == 0:
            assert search.memory(0, length)[1] == -(-(rules.limit(length) - 8) // 64)
        else:
            start, size = [(places[0], 64), (places[1], 16), (places[2], 8)][stage - 1]
            assert found == list(range(start, start + size, 8))


@BOTH
@pytest.mark.parametrize("searched_at", [0, 384, 390, 391, 448, 2143289344])  # never, before, now, later, NaN's bits
def test_what_cannot_be_of_an_earlier_step_is_not_reused(function: Callable[..., None], searched_at: int) -> None:
    search = Searcher(function, whole_numbers([512]))
    expected = search([390])
    search.memory(0, 390)[:4] = torch.tensor([searched_at, 1, 1, 1])
    assert_same(search([390]), expected)


def test_refreshing_every_step_is_remembering_nothing() -> None:
    case = whole_numbers([512])
    every = Searcher(ops.search_blocks, case, rules=Rules(refresh_steps=(1, 1, 1)))
    for length in range(380, 410):
        assert_same(every([length]), Searcher(ops.search_blocks, case)([length]))


def test_between_refreshes_units_stay() -> None:
    search = Searcher(ops.search_blocks, whole_numbers([512]))
    found = [units(search([length])) for length in range(385, 389)]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_row_does_not_depend_on_the_batch() -> None:
    starts = [300, 420, 510]
    case = whole_numbers([600] * 3)
    alone = [Searcher(ops.search_blocks, case, 2) for _ in starts]
    together = Searcher(ops.search_blocks, case, 2)
    for step in range(70):
        rows = [row for row in (2, 0, 1) if step % 23 >= row]  # rows join, leave and change places
        rows = rows if step % 2 else rows[::-1]
        lengths = [starts[row] + step for row in rows]
        selection = together(lengths, rows)
        for at, row in enumerate(rows):
            expected = alone[row]([lengths[at]], [row])
            assert torch.equal(selection.units[at], expected.units[0])


def test_how_many_blocks_share_a_row_changes_nothing(isa: str) -> None:
    """On CUDA a row alone is searched by more blocks than one of many."""
    rows, row = 40, 7
    case = whole_numbers([600] * rows, HeadShape(2, 8, 64))
    together, alone = Searcher(ops.search_blocks, case), Searcher(ops.search_blocks, case)
    for length in (560, 564):
        selection, expected = together([length] * rows), alone([length], [row])
        assert torch.equal(selection.units[row], expected.units[0])
        assert torch.equal(together.memory(row, length), alone.memory(row, length))


def test_threads_change_nothing() -> None:
    case = whole_numbers([6000, 5000], page_size=128)
    rules = Rules(stage_tokens=(4096, 1024), budget=600)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single = Searcher(ops.search_blocks, case, 2, rules)([6000, 5000])
    torch.set_num_threads(2)
    assert_same(Searcher(ops.search_blocks, case, 2, rules)([6000, 5000]), single)
    torch.set_num_threads(threads)


@BOTH
def test_rows_within_the_budget_are_selected_whole(function: Callable[..., None]) -> None:
    search = Searcher(function, whole_numbers([200, 0, 150]))
    selection = search([200, 0, 150])
    assert selection.spans[:, 0].tolist() == [[200, 200], [0, 0], [150, 150]]
    assert not selection.count.any() and not search.state.any()


@pytest.mark.parametrize("length", [201, 264, 300, 777])
def test_the_budget_holds_less_what_lies_in_the_window(length: int) -> None:
    rules = Rules()
    selection = Searcher(ops.search_blocks, whole_numbers([length]), 2, rules)([length])
    for head, mask in enumerate(attended_tokens(selection, 0, length)):
        starts = 8 * torch.tensor(units(selection, 0, head))
        assert (starts.diff() > 0).all() and starts.min() >= rules.sink and starts.max() < rules.limit(length)
        kept = 8 * rules.lists[2] + rules.sink + rules.recent
        overlap = (starts + 8 - (length - rules.recent)).clamp(0, 8).sum()
        assert mask.sum() == kept - overlap <= rules.budget


def test_a_loud_head_chooses_for_all() -> None:
    case = whole_numbers([700])
    case.kv.key[:, 1] *= 64
    shared = Searcher(ops.search_blocks, case, 1)([700])
    own = Searcher(ops.search_blocks, case, 2)([700])
    assert units(shared) == units(own, head=1) != units(own, head=0)


@pytest.mark.parametrize("peak", [300, 31337, 99999, 131072 - 1100])
def test_a_smooth_bump_is_found_in_a_long_row(peak: int) -> None:
    length = 131072
    noise = torch.randn(length, generator=torch.Generator().manual_seed(peak))
    bump = 12 * torch.exp(-((torch.arange(length) - peak) / 64.0).square())
    rules = Rules((256, 32, 8), (32768, 8192), (32, 16, 8), sink=256, recent=1024, budget=3328)
    assert peak // 8 in units(Searcher(ops.search_blocks, one_dim(noise + bump), 1, rules)([length]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(sink=12), r"sink\[0\] must be a multiple of 8, not 12"),
        (Rules(chunk_tokens=(64, 12, 8)), r"chunk_tokens\[0\] must be a multiple"),
        (Rules(refresh_steps=(16, 0, 4)), r"refresh_steps\[1\] must be positive"),
        (Rules(refresh_steps=(16, 4)), "refresh_steps must have 3 elements, not 2"),  # type: ignore[arg-type]  # that is what is wrong
    ],
)
def test_wrong_rules_are_refused(rules: Rules, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Searcher(ops.search_blocks, whole_numbers([300]), rules=rules)([300])


def test_the_state_must_hold_the_lists() -> None:
    search = Searcher(ops.search_blocks, whole_numbers([300]))
    search.state = search.state[..., :-1]
    with pytest.raises(RuntimeError, match=r"state.shape\[2\] must be at least 31, not 30"):
        search([300])


def test_opcheck() -> None:
    search = Searcher(ops.search_blocks, whole_numbers([300]))
    case, rules, selection = search.case, search.rules, search([300])
    bounds = (torch.full((1,), tokens, dtype=torch.int32) for tokens in (rules.sink, rules.recent, rules.budget))
    inputs = (
        case.query, case.kv.key, case.pages, case.seq_lens, search.state, rules.chunk_tokens, rules.stage_tokens,
        rules.refresh_steps, *bounds, None, selection.spans, selection.units, selection.count,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sparseserve.search_blocks.default, inputs, test_utils=OPCHECKS)
