"""The buffers of a step: who attends to how much, what is measured, and that nothing moves."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.config import from_dict
from sparseserve.decode.step import PROMPT_PIECE, StepBuffers, StepWorkspace
from sparseserve.ops import step_scratch
from sparseserve.policies import Policy
from sparseserve.types import CPU, POLICY_BUDGET, PageTable, Step
from tests.helpers.artifact_files import moa_plan
from tests.helpers.contract import CASES, MODEL

HEADS, ROWS = MODEL.heads, 8
LENGTHS = [385, 0, 1, 448]
WHOLE = torch.tensor([True, False, False, False])


def named(policy: str, **settings: Any) -> Policy:
    return from_dict({"policy": policy, **settings})


MEASURING = named("quest", dense_layers=1, recall_sample=0.5)
SHORT = named("moa", artifact=moa_plan([[0.0] * 4] * 5, [[0.1] * 4] * 5), kv_memory="shared")
WINDOWED = named("streaming", kv_memory="shared", recall_sample=0.5)


def buffers(policy: Policy, memory: StepWorkspace | None = None) -> StepBuffers:
    return StepBuffers(policy, policy.plans(MODEL), HEADS, ROWS, MODEL.max_len, CPU, memory)


def table(lengths: list[int]) -> PageTable:
    return PageTable(torch.zeros(len(lengths), 7, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))


def tokens(spans: Tensor, length: int) -> list[int]:
    """The tokens of two spans, by the definition of a Selection."""
    first, last = spans.tolist()
    return [token for token in range(length) if token < first or token >= last]


def addresses(step: Step) -> list[int]:
    """Of every buffer of a step, the table left out."""
    parts: list[Any] = [step, step.everything, step.selection, step.measurement]
    values = (getattr(part, field.name) for part in parts for field in fields(part))
    return [value.data_ptr() for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    ("whole", "own", "expected"),
    [
        (None, None, None),
        (None, [64, 0, 0, 128], [64, POLICY_BUDGET, POLICY_BUDGET, 128]),
        (WHOLE, None, [385, POLICY_BUDGET, POLICY_BUDGET, POLICY_BUDGET]),
        (WHOLE, [64, 0, 0, 128], [385, POLICY_BUDGET, POLICY_BUDGET, 128]),  # its length, whatever it asked for
    ],
)
def test_the_budget_of_a_row(whole: Tensor | None, own: list[int] | None, expected: list[int] | None) -> None:
    given = None if own is None else torch.tensor(own, dtype=torch.int32)
    step = buffers(CASES["quest-mean_std"]).step(table(LENGTHS), whole, given)
    assert (None if step.row_budget is None else step.row_budget.tolist()) == expected
    assert step.everything.spans.tolist() == [[[length] * 2] for length in LENGTHS]


# layers that are dense; windows that grow from page to page, from a minimum on
@pytest.mark.parametrize("policy", [CASES["retrieval"], SHORT], ids=lambda policy: policy.name)
def test_windows_are_those_of_the_plans_and_whole_rows_have_all(policy: Policy) -> None:
    step = buffers(policy).step(table(LENGTHS), WHOLE)
    windows = {plan.layer: plan.window for plan in policy.plans(MODEL) if plan.window is not None}
    assert step.windows.shape == (5, len(LENGTHS), 2, 2) and len(windows) == (4 if policy.name == "retrieval" else 5)
    for layer, window in windows.items():
        assert torch.equal(step.windows[layer, 1:], window.spans(step.table.seq_lens)[1:])
        assert [tokens(spans, 385) for spans in step.windows[layer, 0]] == [[*range(385)]] * 2


def test_policies_without_windows_have_none() -> None:
    assert buffers(CASES["tidal"]).step(table(LENGTHS), WHOLE).windows.shape == (0, 4, 2, 2)


def compared(step: Step, layer: int) -> list[bool]:
    """Which rows the second attend of a layer reads everything of; the others must read nothing."""
    assert step.measurement is not None
    read = [len(tokens(step.measurement.spans[layer, row, 0], length)) for row, length in enumerate(LENGTHS)]
    assert all(count in (0, length) for count, length in zip(read, LENGTHS, strict=True))
    return [count > 0 for count in read]


def test_measured_layers_read_everything_but_of_rows_that_have_it_already() -> None:
    made = buffers(MEASURING)
    step = made.step(table(LENGTHS), WHOLE, measured=(1, 3))
    assert step.measurement is not None and [*step.measurement.layers] == [1, 3]
    assert compared(step, 1) == compared(step, 3) == [False, False, True, True]
    assert compared(step, 2) == [False] * 4
    assert compared(made.step(table(LENGTHS), measured=(2,)), 2) == [True, False, True, True]
    assert compared(made.step(table(LENGTHS), measured=(3,)), 2) == [False] * 4  # forgotten since


def test_launched_layers_read_nothing_where_nothing_is_measured() -> None:
    made = buffers(MEASURING)
    step = made.step(table(LENGTHS), measured=(2,), launched=range(1, 5))
    assert step.measurement is not None and [*step.measurement.layers] == [1, 2, 3, 4]
    assert [any(compared(step, layer)) for layer in range(1, 5)] == [False, True, False, False]
    nothing = made.step(table(LENGTHS), launched=range(1, 5))
    assert not any(any(compared(nothing, layer)) for layer in range(1, 5))


def test_nothing_is_measured_unasked() -> None:
    assert buffers(MEASURING).step(table(LENGTHS)).measurement is None
    plain = buffers(named("quest", dense_layers=1))
    assert plain.measurement is None and plain.step(table(LENGTHS), measured=(1,)).measurement is None


@pytest.mark.parametrize("policy", [MEASURING, WINDOWED], ids=lambda policy: policy.name)
def test_buffers_stay_where_they_are(policy: Policy) -> None:
    made = buffers(policy)
    first = addresses(made.step(table(LENGTHS), WHOLE, measured=(1,)))
    other = addresses(made.step(table([5] * ROWS), torch.ones(ROWS, dtype=torch.bool), measured=(2, 3)))
    assert first == other and len(first) > 10


def test_a_step_is_cut_to_its_rows() -> None:
    policy = CASES["quest-mean_std"]
    step = buffers(policy).step(table(LENGTHS))
    assert step.selection.units.shape == (4, 2, policy.selection_units(MODEL.max_len))
    assert step.scores.shape == (4, 2, 448 // 16) and step.lse.shape == (4, 4)
    assert (step.attended_dense.shape, step.attended.shape) == ((5, 4, 1), (5, 4, 2))


def test_memory_that_exists_is_taken() -> None:
    memory = StepWorkspace(torch.empty(ROWS, 2, 28), torch.empty(7))
    step = buffers(CASES["quest-mean_std"], memory).step(table(LENGTHS))
    assert step.scratch is memory.scratch and step.scores.data_ptr() == memory.scores.data_ptr()


@pytest.mark.parametrize(
    ("kept", "rows", "scratch"), [("per_head", 4, PROMPT_PIECE), ("per_head", 200, 200), ("shared", 4, 4)]
)
def test_heads_that_free_pages_have_scratch_for_a_piece_of_a_prompt(kept: str, rows: int, scratch: int) -> None:
    meta, policy = torch.device("meta"), named("streaming", kv_memory=kept)
    memory = StepWorkspace.allocate(policy, HEADS, rows, MODEL.max_len, meta)
    expected = step_scratch(scratch, HEADS.query_heads, HEADS.head_dim, meta)
    assert memory.scratch is not None and memory.scratch.shape == expected.shape
    assert memory.nbytes == memory.scores.nbytes + expected.nbytes
    on_cpu = StepWorkspace.allocate(policy, HEADS, rows, MODEL.max_len, CPU)
    assert on_cpu.scratch is None and on_cpu.nbytes == on_cpu.scores.nbytes
