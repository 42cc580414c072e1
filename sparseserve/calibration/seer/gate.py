"""The decode gates of SeerAttention-R (arXiv 2506.08889, section 3) in a form that can be trained.

The function is that of `reference.summarize_gates` and `reference.score_gates`, for all layers and rows at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseserve.reference.gate import EPSILON, rotate
from sparseserve.types import HeadShape


class Gates(nn.Module):
    """The gates of L layers, fp32: query [L, H, G, D, E], key [L, H, 3D, E], query_norm and key_norm [L, E]."""

    def __init__(self, layers: int, heads: HeadShape, gate_dim: int, qk_norm: bool, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        dim = heads.head_dim
        self.query = _drawn(draw, layers, heads.kv_heads, heads.queries_per_kv, dim, gate_dim)
        self.key = _drawn(draw, layers, heads.kv_heads, 3 * dim, gate_dim)
        self.query_norm = nn.Parameter(torch.ones(layers, gate_dim)) if qk_norm else None
        self.key_norm = nn.Parameter(torch.ones(layers, gate_dim)) if qk_norm else None

    def forward(self, query: Tensor, pooled: Tensor, rows: Tensor, block: int, rope: Tensor | None) -> Tensor:
        """The log-softmax [L, R, H, N] over the blocks that lie whole before each row's own, -inf elsewhere.

        query [L, R, Hq, D] and pooled [L, H, N, 3D] before their rotation, `rows` [R] the queries' positions, `block`
        tokens per block, `rope` [T, E] cos then sin of the gate's rotation.
        """
        grouped = query.reshape(*query.shape[:2], *self.query.shape[1:4])
        projected = torch.einsum("lrhgd,lhgde->lrhe", grouped, self.query)
        keys = torch.einsum("lhnp,lhpe->lnhe", pooled, self.key)
        blocks = torch.arange(keys.shape[1], device=rows.device)
        queries = _finish(projected, self.query_norm, rope, rows)
        keys = _finish(keys, self.key_norm, rope, blocks * block)
        logits = torch.einsum("lrhe,lnhe->lrhn", queries, keys) / self.key.shape[-1] ** 0.5
        later = blocks >= (rows // block)[:, None, None]
        shares: Tensor = logits.masked_fill(later, -torch.inf).log_softmax(-1)
        return shares


def _drawn(draw: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=draw) / shape[-2] ** 0.5)


def _finish(x: Tensor, norm: Tensor | None, rope: Tensor | None, positions: Tensor) -> Tensor:
    """RMS norm and rotation of x [L, T, H, E] at `positions` [T]."""
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * norm[:, None, None]
    return x if rope is None else rotate(x, rope[positions][:, None])
