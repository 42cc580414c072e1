"""The softmax mass that a layer keeps, as decode steps measure it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_contract import CASES, LENGTHS, MODEL, data
from torch import Tensor

from sparseserve.policies import Dense, Policy, Quest
from sparseserve.policies.base import WindowPolicy
from sparseserve.testing.bed import Bed
from sparseserve.types import PageTable

__all__ = ["data"]  # the fixture
pytestmark = pytest.mark.usefixtures("device")


def measuring(policy: Policy) -> Policy:
    shared = {"kv_memory": "shared"} if isinstance(policy, WindowPolicy) else {}
    return policy.model_copy(update={"measure_recall": True, **shared})


def mass(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Of the tokens in `mask` [Hs, T] among all T tokens of a row: query [Hq, D], key [T, H, D]."""
    heads = query.shape[0]
    keys = key.double().repeat_interleave(heads // key.shape[1], 1)
    weights = (torch.einsum("hd,thd->ht", query.double(), keys) * query.shape[1] ** -0.5).softmax(1)
    return (weights * mask.repeat_interleave(heads // len(mask), 0)).sum(1).mean()


@pytest.mark.parametrize("name", CASES)
def test_recall_is_the_mass_of_what_was_attended_to(name: str, data: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = data
    outcome = Bed(measuring(CASES[name]), MODEL, LENGTHS).fill(key, value).decode(query)
    assert outcome.recall is not None
    for layer, mask in enumerate(outcome.masks):
        for row, length in enumerate(LENGTHS):
            if length:
                kept = mass(query[layer, row], key[layer, row, :length], mask[row, :, :length])
                torch.testing.assert_close(outcome.recall[layer, row].double(), kept, rtol=0, atol=1e-4)
    plain = Bed(CASES[name], MODEL, LENGTHS).fill(key, value).decode(query)
    assert torch.equal(outcome.out, plain.out)  # measuring changes no answer


def test_recall_is_one_where_everything_is_attended_to(data: tuple[Tensor, Tensor, Tensor]) -> None:
    rows = [row for row, length in enumerate(LENGTHS) if length]
    for policy in (Dense(), Quest(dense_layers=0, budget_tokens=MODEL.max_len)):
        recall = Bed(measuring(policy), MODEL, LENGTHS).fill(*data[1:]).decode(data[0]).recall
        assert recall is not None
        torch.testing.assert_close(recall[:, rows], torch.ones(MODEL.layers, len(rows)))


def test_a_row_without_tokens_takes_part_in_no_number(data: tuple[Tensor, Tensor, Tensor]) -> None:
    stats = pytest.importorskip("sparseserve.plugin.stats")
    policy = measuring(Quest(dense_layers=1, budget_tokens=128))
    bed = Bed(policy, MODEL, LENGTHS).fill(*data[1:])
    recall = bed.decode(data[0]).recall
    assert recall is not None
    meter, before = stats.Meter(policy, list(policy.plans(MODEL))), counted(stats)
    meter.count_tokens(bed.buffers.step(PageTable(bed.pages, torch.tensor(LENGTHS, dtype=torch.int32))))
    rows = [row for row, length in enumerate(LENGTHS) if length]
    for layer, (total, count) in counted(stats).items():
        assert count - before[layer][1] == len(rows)
        assert total - before[layer][0] == pytest.approx(float(recall[layer, rows].sum()))


def counted(stats: Any) -> dict[int, tuple[float, float]]:
    """Sum and count of every layer, as a scrape gets them."""
    samples = next(samples for name, *_, samples in stats.snapshot() if name == "sparseserve_attention_recall")
    values = {(sample, labels["layer"]): value for sample, labels, value in samples if labels["policy"] == "quest"}
    name = "sparseserve_attention_recall"
    return {layer: (values[f"{name}_sum", str(layer)], values[f"{name}_count", str(layer)]) for layer in range(5)}
