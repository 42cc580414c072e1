"""Our ops as contenders, each checked against the reference on one row and KV head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.bench.gpu import byte_model
from kernels.bench.gpu.layers import DTYPE, QUEST, SEER, TIDAL, UNCACHED, Layers, Rule
from kernels.bench.gpu.timing import Builders, Contender
from sparseserve import ops, reference
from sparseserve.testing.oracle import assert_as_exact, torch_attend
from sparseserve.types import Bound, Gate, Selection, Wanted

Check = Callable[[Tensor], None]  # of outputs [B, Hq, D] of the last layer


def contenders(layers: Layers, l2_bytes: int) -> Builders:
    """Everything of ours that the pages of `layers` have room for, and the copies that it is held against."""
    point, heads = layers.point, layers.heads
    rows = point.batch
    dense, sparse = (byte_model.attend(heads, rows, tokens) for tokens in (point.context, point.budget))
    builders: Builders = {
        "copy of a dense layer": lambda: copy(layers, dense, l2_bytes),
        "copy of a sparse layer": lambda: copy(layers, sparse, l2_bytes),
        "attend everything": lambda: attend(layers, layers.everything(), point.context),
        "tidal reuse layer": lambda: attend(layers, layers.random_selection(TIDAL), point.budget),
        "attend units of 32": lambda: attend(layers, layers.random_selection(QUEST), point.budget),
        "attend units of 64": lambda: attend(layers, layers.random_selection(SEER), point.budget),
        "tidal score + select": lambda: select(layers, tidal_scores(layers)),
    }
    if layers.quest_units:
        builders["summarize_pages"] = lambda: summarize_pages(layers)
        builders["quest score + select"] = lambda: select(layers, quest_scores(layers))
        builders["quest layer"] = lambda: sparse_layer(layers, quest_scores(layers))
    if layers.seer_units:
        builders["seer score + select"] = lambda: select(layers, seer_scores(layers))
        builders["seer layer"] = lambda: sparse_layer(layers, seer_scores(layers))
    return builders


def copy(layers: Layers, size: int, l2_bytes: int) -> Contender:
    """torch's copy of `size` bytes of every layer, which moves them twice: it reads and it writes."""
    sources = layers.memory.view(torch.int16).flatten(1)[:, : size // 2]  # half of a gate key may be NaN
    targets = sources.new_empty(-(-UNCACHED * l2_bytes // size), sources.shape[1])

    def check() -> None:
        last = layers.count - 1
        assert torch.equal(targets[last % len(targets)], sources[last]), "the copy differs"

    return Contender((2 * size,), lambda i: targets[i % len(targets)].copy_(sources[i]), (targets,), check)


def outputs(layers: Layers) -> Tensor:
    """Memory for what the attention of every layer gives, [L, B, Hq, D]."""
    return layers.query.new_empty(layers.count, *layers.query.shape)


def output_check(layers: Layers, selection: Selection) -> Check:
    """Attention over `selection` as exact as torch's, in the last layer; what is right is computed once."""

    @cache
    def expected() -> tuple[Tensor, Tensor]:
        case, mine = layers.sample(layers.count - 1), layers.sampled_selection(selection)
        arguments = case.query, case.kv, case.table, mine, case.scale
        return reference.attend(*arguments, dtype=torch.float64)[0], torch_attend(case, mine)

    def check(out: Tensor) -> None:
        assert_as_exact(layers.sampled_queries(out), *expected(), terms=layers.point.context)

    return check


def attend_call(layers: Layers, out: Tensor, selections: list[Selection]) -> Callable[[int], object]:
    """`attend` of every layer; the layers take turns with the selections."""
    lse = layers.query.new_empty(layers.query.shape[:2], dtype=torch.float32)
    attended = torch.empty_like(selections[0].count)

    def call(i: int) -> object:
        selection = selections[i % len(selections)]
        arguments = layers.query, layers.kv(i), layers.table, selection, layers.scale
        return ops.attend(*arguments, out=out[i], lse=lse, attended=attended, scratch=layers.scratch)

    return call


def attend(layers: Layers, selection: Selection, tokens: int) -> Contender:
    """Attention over one selection of about `tokens` tokens, which all layers use as tidal's layers do."""
    out, check = outputs(layers), output_check(layers, selection)
    moved = byte_model.attend(layers.heads, layers.point.batch, tokens)
    return Contender((moved,), attend_call(layers, out, [selection]), (out,), lambda: check(out[-1]))


@dataclass(frozen=True, slots=True)
class Scores:
    """How a policy scores its units."""

    rule: Rule
    bytes: int
    score: Callable[[int, Tensor, Wanted], object]  # the units of a layer, into scores [B, H, units], and select
    exact: Callable[[torch.dtype], Tensor]  # of the sample in the last layer, [1, 1, units], by the reference
    terms: int  # numbers in the sum that a score is
    magnitude: float | None = None  # of these numbers, for a score of 1; of the scores without


def quest_scores(layers: Layers) -> Scores:
    """Summaries in the tails of the pages, scored by mean + deviation."""
    unit = QUEST.unit_tokens

    def score(i: int, scores: Tensor, wanted: Wanted) -> object:
        arguments = layers.query, layers.summaries[i], layers.table
        return ops.score_pages(*arguments, unit, Bound.MEAN_STD, scores, wanted, layers.scratch)

    def exact(dtype: torch.dtype) -> Tensor:
        case = layers.sample(layers.count - 1)
        summary = layers.sampled_pages(layers.summaries[-1])
        arguments = case.query, summary, case.table, unit, Bound.MEAN_STD
        return reference.score_pages(*arguments, dtype=dtype)

    moved = byte_model.score_pages(layers.heads, layers.point.batch, layers.point.context // unit)
    return Scores(QUEST, moved, score, exact, terms=2 * layers.heads.head_dim)


def seer_scores(layers: Layers) -> Scores:
    """Gate keys in the tails of the pages; every layer has its own gate."""
    unit, gates = SEER.unit_tokens, layers.gates

    def score(i: int, scores: Tensor, wanted: Wanted) -> object:
        arguments = layers.query, layers.gate_keys[i], layers.table
        return ops.score_gates(*arguments, unit, gates[i], scores, wanted)

    def exact(dtype: torch.dtype) -> Tensor:
        case, gate = layers.sample(layers.count - 1), gates[-1]
        assert gate.query_norm is not None
        weight = gate.query[layers.head :][:1].cpu()
        norm, rope = gate.query_norm.cpu(), gate.unrope.cpu()
        mine = Gate(weight, weight, norm, norm, unrope=rope, rope=rope)
        summary = layers.sampled_pages(layers.gate_keys[-1])
        return reference.score_gates(case.query, summary, case.table, unit, mine, dtype=dtype)

    moved = byte_model.score_gates(layers.heads, layers.point.batch, layers.point.context // unit)
    terms = (layers.heads.queries_per_kv + 1) * layers.heads.head_dim
    return Scores(SEER, moved, score, exact, terms)


def tidal_scores(layers: Layers) -> Scores:
    """The attention mass of every token; all layers take the log-sum-exp of the last one, which is right there."""
    arguments = layers.table, layers.everything(), layers.scale
    _, lse = ops.attend(layers.query, layers.kv(layers.count - 1), *arguments, scratch=layers.scratch)

    def score(i: int, scores: Tensor, wanted: Wanted) -> object:
        arguments = layers.query, layers.kv(i).key, layers.table, lse, layers.scale
        return ops.score_tokens(*arguments, scores, 1, wanted, layers.scratch)

    def exact(dtype: torch.dtype) -> Tensor:
        case = layers.sample(layers.count - 1)
        scores = torch.empty(1, 1, layers.point.context, dtype=dtype)
        mine = layers.sampled_queries(lse)
        arguments = case.query, case.kv.key, case.table, mine, case.scale
        return reference.score_tokens(*arguments, scores, 1, dtype=dtype)

    moved = byte_model.score_tokens(layers.heads, layers.point.batch, layers.point.context)
    dim = layers.heads.head_dim
    # exp turns the absolute error of a logit, about |q||k| scale, into a relative one
    return Scores(TIDAL, moved, score, exact, dim + layers.heads.queries_per_kv, magnitude=2 * layers.scale * dim)


def select(layers: Layers, of: Scores) -> Contender:
    """Scores and the best units within the budget, in one kernel."""
    return _selecting(layers, of)[0]


def sparse_layer(layers: Layers, of: Scores) -> Contender:
    """Scores, the best units, and attention to them."""
    selecting, selections = _selecting(layers, of)
    out = outputs(layers)
    attention = attend_call(layers, out, selections)

    def call(i: int) -> None:
        selecting.call(i)
        attention(i)

    def check() -> None:
        selecting.check()
        output_check(layers, selections[-1])(out[-1])

    moved = byte_model.attend(layers.heads, layers.point.batch, layers.point.budget)
    return Contender((*selecting.kernels, moved), call, (*selecting.results, out), check)


def _selecting(layers: Layers, of: Scores) -> tuple[Contender, list[Selection]]:
    point, heads, rule = layers.point, layers.heads, of.rule
    units, slots = point.context // rule.unit_tokens, rule.slots(point.budget)
    scores = torch.empty(point.batch, heads.kv_heads, units, device=layers.device)
    kept = torch.tensor([rule.sink, rule.recent, point.budget], dtype=torch.int32, device=layers.device)
    sink, recent, budget = kept[:, None].repeat(1, heads.kv_heads)
    buffers, selections = layers.empty_selections(rule)

    def call(i: int) -> None:
        of.score(i, scores, Wanted(selections[i], sink, recent, budget))

    def check() -> None:
        actual, exact = layers.sampled_heads(scores), of.exact(torch.float64)
        magnitude = of.magnitude and of.magnitude * exact.max().item()
        assert_as_exact(actual, exact, of.exact(torch.float32), of.terms, magnitude)
        mine = layers.sampled_selection(selections[-1])
        expected = Selection.empty(1, 1, slots, rule.unit_tokens)
        limits = (limit[:1].cpu() for limit in (sink, recent, budget))
        reference.select_units(actual, layers.seq_lens[:1].cpu(), Wanted(expected, *limits))
        for part in ("spans", "units", "count"):
            assert torch.equal(getattr(mine, part), getattr(expected, part)), f"{part} differ from the reference's"

    moved = of.bytes + byte_model.select(heads, point.batch, units, slots)  # one kernel
    return Contender((moved,), call, (scores, *buffers), check), selections


def summarize_pages(layers: Layers) -> Contender:
    """A decode batch whose every row completes a unit; most steps complete none."""
    heads, size, dim = layers.heads, layers.point.page_size, layers.heads.head_dim
    summaries = torch.empty(
        layers.count, layers.pool, heads.kv_heads, layers.quest_units, 2, dim, dtype=DTYPE, device=layers.device
    )
    slots = layers.pages[:, -1].long() * size + size - 1

    def call(i: int) -> None:
        ops.summarize_pages(layers.kv(i).key, slots, summaries[i], Bound.MEAN_STD)

    def check() -> None:
        case = layers.sample(layers.count - 1)
        actual = layers.sampled_pages(summaries[-1])
        last = torch.tensor([case.capacity - 1])
        exact, peer = (torch.zeros_like(actual, dtype=dtype) for dtype in (torch.float64, DTYPE))
        reference.summarize_pages(case.kv.key, last, exact, Bound.MEAN_STD, dtype=torch.float64)
        reference.summarize_pages(case.kv.key, last, peer, Bound.MEAN_STD)
        assert_as_exact(actual, exact, peer, terms=QUEST.unit_tokens)

    moved = byte_model.summarize_pages(heads, layers.point.batch, QUEST.unit_tokens)
    return Contender((moved,), call, (summaries,), check)
