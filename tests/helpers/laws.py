"""The nine laws and the poison test that every policy keeps, over the CPU kernels or whatever the ops are routed to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseserve.policies import S2, Dense, Policy
from sparseserve.testing.bed import Bed, Outcome
from sparseserve.types import LayerPlan
from tests.helpers.contract import BUDGET, LENGTHS, MODEL, RECENT, SINK

Data = tuple[Tensor, Tensor, Tensor]  # query, key and value


def same(a: Outcome, b: Outcome) -> bool:
    """Bit for bit."""
    return torch.equal(a.out, b.out) and all(map(torch.equal, a.masks, b.masks))


def sparse_layers(policy: Policy) -> list[int]:
    return [plan.layer for plan in policy.plans(MODEL) if not plan.dense_output]


def limit(policy: Policy, plan: LayerPlan, lengths: torch.Tensor) -> torch.Tensor:
    """Tokens that a head may attend to in rows of `lengths` [B, 1]: the budget, or what the plan promises it."""
    if plan.dense_output:
        return lengths
    if plan.window is None:
        return lengths.clamp(max=BUDGET)
    lines = plan.window.alpha + plan.window.beta * lengths[..., None]
    span = lines.amax(-1).clamp(min=plan.window.minimum) + plan.window.align - 1
    units = torch.tensor([[policy.selection_units(length)] for length in lengths[:, 0].tolist()])
    return torch.minimum(lengths, span + units * policy.selection_unit)


def law_1_the_budget_holds(policy: Policy, data: Data) -> None:
    outcome = Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0])
    lengths = torch.tensor(LENGTHS)[:, None]
    for plan, mask, attended in zip(policy.plans(MODEL), outcome.masks, outcome.attended, strict=True):
        assert (mask.sum(-1) <= limit(policy, plan, lengths)).all()
        assert torch.equal(mask.sum(-1).int(), attended)  # the kernel read just what was selected


def law_2_units_ascend_and_are_in_range(policy: Policy, data: Data) -> None:
    for selection in Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0]).selections:
        for row, length in enumerate(LENGTHS):
            for head in range(selection.count.shape[1]):
                units = selection.units[row, head, : selection.count[row, head]].tolist()
                assert units == sorted(set(units))
                assert all(0 <= unit * selection.unit_tokens < length for unit in units)


def law_3_sink_recent_and_current_are_kept(policy: Policy, data: Data) -> None:
    for mask in Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0]).masks:
        for row, length in enumerate(LENGTHS):
            assert isinstance(policy, S2) or mask[row, :, : min(SINK, length)].all()  # S2 has no sink
            assert mask[row, :, max(0, length - RECENT) : length].all()


def law_4_a_budget_over_the_length_is_dense(policy: Policy, data: Data) -> None:
    dense = Bed(Dense(), MODEL, LENGTHS).fill(*data[1:]).decode(data[0])
    outcome = Bed(policy, MODEL, LENGTHS).fill(*data[1:]).decode(data[0])
    for row, length in enumerate(LENGTHS):
        if length <= BUDGET:
            assert torch.equal(outcome.out[:, row], dense.out[:, row])


def law_5_a_row_does_not_depend_on_the_others(policy: Policy, data: Data) -> None:
    bed = Bed(policy, MODEL, LENGTHS).fill(*data[1:])
    whole = bed.decode(data[0])
    order = [7, 2, 0, 6, 1, 5, 3, 4]
    assert torch.equal(bed.decode(data[0], order).out, whole.out[:, order])
    for row in range(len(LENGTHS)):
        assert torch.equal(bed.decode(data[0], [row]).out[:, 0], whole.out[:, row])


def law_6_physical_pages_have_no_meaning(policy: Policy, data: Data) -> None:
    first = Bed(policy, MODEL, LENGTHS, page_order=1).fill(*data[1:]).decode(data[0])
    second = Bed(policy, MODEL, LENGTHS, page_order=2).fill(*data[1:]).decode(data[0])
    assert same(first, second)


def law_7_summaries_grow_as_if_built_at_once(policy: Policy, data: Data, chunk: int) -> None:
    whole = Bed(policy, MODEL, LENGTHS).fill(*data[1:])
    grown = Bed(policy, MODEL, LENGTHS).fill(*data[1:], chunk=chunk)
    for a, b in zip(whole.layers, grown.layers, strict=True):
        assert a.page_state is None or (b.page_state is not None and torch.equal(a.page_state, b.page_state))
    assert same(whole.decode(data[0]), grown.decode(data[0]))


def law_8_a_reissued_page_carries_nothing_over(policy: Policy, data: Data) -> None:
    query, key, value = data
    fresh = Bed(policy, MODEL, LENGTHS).fill(key, value).decode(query)
    used = Bed(policy, MODEL, LENGTHS, filler=float("nan"))
    used.lengths = [MODEL.max_len] * len(LENGTHS)
    used.fill(key.flip(2) * 50, value.flip(2) * 50)
    used.lengths = LENGTHS
    assert same(fresh, used.fill(key, value).decode(query))


def law_9_a_step_in_used_buffers_is_the_same(policy: Policy, data: Data) -> None:
    bed = Bed(policy, MODEL, LENGTHS).fill(*data[1:])
    first = bed.decode(data[0])
    bed.decode(data[0].flip(0, 2) * 3, [6, 0, 7])  # leaves other scores, units and counts behind
    assert same(first, bed.decode(data[0]))


def poison_in_unselected_values_changes_nothing(policy: Policy, data: Data, poison: float) -> None:
    bed = Bed(policy, MODEL, LENGTHS).fill(*data[1:])
    clean = bed.decode(data[0])
    poisoned = 0
    heads = MODEL.heads
    for layer, mask in enumerate(clean.masks):
        read = mask.expand(-1, heads.query_heads, -1) if mask.shape[1] == 1 else mask
        read = read.view(len(read), heads.kv_heads, -1, read.shape[2]).any(2)  # [B, H, T] by KV head
        for row, head, token in (~read).nonzero().tolist():
            page = bed.pages[row, token // bed.page_size]
            bed.layers[layer].kv.value[page, head, token % bed.page_size] = poison
            poisoned += token < LENGTHS[row]
    assert same(clean, bed.decode(data[0]))
    assert bool(poisoned) == bool(sparse_layers(policy))


LAWS: dict[str, Callable[[Policy, Data], None]] = {
    "1_the_budget_holds": law_1_the_budget_holds,
    "2_units_ascend_and_are_in_range": law_2_units_ascend_and_are_in_range,
    "3_sink_recent_and_current_are_kept": law_3_sink_recent_and_current_are_kept,
    "4_a_budget_over_the_length_is_dense": law_4_a_budget_over_the_length_is_dense,
    "5_a_row_does_not_depend_on_the_others": law_5_a_row_does_not_depend_on_the_others,
    "6_physical_pages_have_no_meaning": law_6_physical_pages_have_no_meaning,
    "7_summaries_grow_token_by_token": partial(law_7_summaries_grow_as_if_built_at_once, chunk=1),
    "7_summaries_grow_by_chunks": partial(law_7_summaries_grow_as_if_built_at_once, chunk=37),
    "8_a_reissued_page_carries_nothing_over": law_8_a_reissued_page_carries_nothing_over,
    "9_a_step_in_used_buffers_is_the_same": law_9_a_step_in_used_buffers_is_the_same,
    "poison_of_nan": partial(poison_in_unselected_values_changes_nothing, poison=float("nan")),
    "poison_of_1e4": partial(poison_in_unselected_values_changes_nothing, poison=1e4),
}
