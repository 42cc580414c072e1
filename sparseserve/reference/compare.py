"""What attention over a selection loses."""

from __future__ import annotations

import torch
from torch import Tensor


def compare_outputs(
    out: Tensor,
    lse: Tensor,
    dense_out: Tensor,
    dense_lse: Tensor,
    recall: Tensor,
    error: Tensor,
    floor: float = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """See `sparseserve.ops.compare_outputs`; `dtype` is that of the arithmetic."""
    nothing = (dense_lse == -torch.inf).any(1)
    apart = (out.to(dtype) - dense_out.to(dtype)).norm(dim=2)  # [B, Hq]
    errors = torch.where(apart == 0, 0, apart / dense_out.to(dtype).norm(dim=2))
    kept = (lse.to(dtype) - dense_lse.to(dtype)).exp()
    for to, of_heads in ((recall, kept), (error, errors)):
        to.copy_(of_heads.mean(1).masked_fill(nothing, torch.nan))
    lost = recall < floor
    out[lost] = dense_out[lost]
