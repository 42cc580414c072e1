"""What rows of the contract hold."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.contract import LENGTHS, MODEL


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [L, B, Hq, D], key and value [L, B, T, H, D]."""
    random = torch.Generator().manual_seed(7)
    heads, rows = MODEL.heads, len(LENGTHS)
    query = torch.randn(MODEL.layers, rows, heads.query_heads, heads.head_dim, generator=random)
    key, value = torch.randn(2, MODEL.layers, rows, MODEL.max_len, heads.kv_heads, heads.head_dim, generator=random)
    return query.bfloat16() * 2, key.bfloat16(), value.bfloat16()
