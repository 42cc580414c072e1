"""How exact a kernel must be: measured against fp64, not against a tolerance that someone liked."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparseserve.reference.attend import attended_tokens
from sparseserve.reference.paging import row_tokens
from sparseserve.testing.cases import Case
from sparseserve.types import Selection


def assert_as_exact(actual: Tensor, exact: Tensor, peer: Tensor, terms: int, magnitude: float | None = None) -> None:
    """Fail unless `actual` is about as near to `exact` (fp64) as `peer` is, torch's own result at that precision.

    The bound is twice the peer's largest error plus the rounding of an fp32 reduction over `terms` numbers of the size
    `magnitude` (of `exact` when not given): errors of single roundings add up like a random walk.
    """
    finite = exact.isfinite()
    torch.testing.assert_close(actual.double()[~finite], exact[~finite], rtol=0, atol=0)
    actual, exact, peer = actual.double()[finite], exact[finite], peer.double()[finite]
    if not exact.numel():
        return
    size = exact.abs().max().item() if magnitude is None else magnitude
    bound = 2 * _largest(peer - exact) + 2 * torch.finfo(torch.float32).eps * math.sqrt(terms) * size
    error = _largest(actual - exact)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}, twice torch's error plus fp32 rounding"


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def torch_attend(case: Case, selection: Selection) -> Tensor:
    """`attend` [B, Hq, D] by torch's scaled_dot_product_attention in the dtype of the case."""
    out = torch.zeros_like(case.query)
    for row, length in enumerate(case.seq_lens.tolist()):
        chosen = attended_tokens(selection, row, length)
        chosen = chosen.repeat_interleave(case.shape.query_heads // len(chosen), 0)
        pages, places = case.pages[..., row, :], case.kv.places
        keys, values = (row_tokens(half, pages, length, places) for half in (case.kv.key, case.kv.value))
        mixed = scaled_dot_product_attention(
            case.query[row][None, :, None],
            keys.repeat_interleave(case.shape.queries_per_kv, 0)[None],
            values.repeat_interleave(case.shape.queries_per_kv, 0)[None],
            attn_mask=chosen[None, :, None],
            scale=case.scale,
        )
        out[row] = mixed[0, :, 0].where(chosen.any(1, keepdim=True), 0)
    return out
