"""Dense: the control is torch's attention over everything, and nothing about it can be changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from sparseserve.config import from_dict
from sparseserve.policies import Dense
from sparseserve.request_options import aliases
from sparseserve.testing.bed import Bed
from sparseserve.testing.oracle import assert_as_exact
from sparseserve.types import Role
from tests.helpers.contract import LENGTHS, MODEL
from tests.helpers.laws import Data

DENSE = from_dict({"policy": "dense"})
HEADS = MODEL.heads


@pytest.mark.usefixtures("device")
def test_every_layer_is_torchs_attention_over_everything(data: Data) -> None:
    query, key, value = (part[:2] for part in data)
    outcome = Bed(DENSE, replace(MODEL, layers=2), LENGTHS).fill(key, value).decode(query)
    for layer, out in enumerate(outcome.out):
        assert outcome.attended[layer].tolist() == [[length] for length in LENGTHS]
        for row, length in enumerate(LENGTHS):
            tokens = (part[layer, row, :length].transpose(0, 1) for part in (key, value))  # [H, T, D]
            keys, values = (part.repeat_interleave(HEADS.queries_per_kv, 0) for part in tokens)
            exact, peer = (
                attend(query[layer, row, :, None].to(dtype), keys.to(dtype), values.to(dtype))[:, 0]
                for dtype in (torch.float64, torch.bfloat16)
            )
            assert_as_exact(out[row], exact, peer, terms=MODEL.max_len)


def test_no_layer_is_sparse() -> None:
    plans = DENSE.plans(MODEL)
    assert [(plan.layer, plan.role, plan.dense_output, plan.window) for plan in plans] == [
        (layer, Role.DENSE, True, None) for layer in range(MODEL.layers)
    ]
    assert not DENSE.is_sparse and not DENSE.frees_pages
    assert [DENSE.expected_tokens(plans[0], length) for length in (0, 1024, 99999)] == [0, 1024, 99999]


def test_it_needs_nothing_beside_the_cache() -> None:
    assert DENSE.page_state(HEADS, 64) is None and DENSE.page_state_bytes(HEADS, 64, 2) == 0
    assert DENSE.selection_units(9999) == DENSE.scored_units(9999) == 0
    assert DENSE.scored_bytes(DENSE.plans(MODEL)[0], MODEL, 9999, 2) == 0


def test_there_is_no_budget_and_no_other_way_to_ask_for_it() -> None:
    assert DENSE.budget == 0 and DENSE.at_budget(512) == {} and DENSE.budgets is None
    assert aliases("model", DENSE) == []
    assert isinstance(DENSE, Dense) and Dense.has_defaults()
