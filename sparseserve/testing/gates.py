"""Gates and rotations for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.artifacts import Artifact
from sparseserve.model import ModelShape


def plain_rope(positions: int, dim: int, theta: float = 10000.0) -> Tensor:
    """cos and sin [positions, dim] fp32 of the plain rotary embedding."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def random_gates(model: ModelShape, block_size: int = 64, gate_dim: int = 128) -> Artifact:
    """Decode gates as published, for every layer of `model`, all ranks together."""
    generator = torch.Generator().manual_seed(0)
    heads, group, dim = model.heads.kv_heads * model.ranks, model.heads.queries_per_kv, model.heads.head_dim
    arguments = {
        "block_size": block_size,
        "gate_dim": gate_dim,
        "budget_tokens": 4096,
        "threshold": 0.0,
        "method": "threshold",
        "start_layer": 0,
        "use_rope": True,
        "use_qk_norm": True,
    }

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(dim**0.5).bfloat16()

    tensors: dict[str, Tensor] = {}
    for layer in range(model.layers):
        tensors |= {f"query.{layer}": draw(heads, group, dim, gate_dim), f"key.{layer}": draw(heads, 3 * dim, gate_dim)}
        tensors |= {f"{name}.{layer}": 1 + draw(gate_dim) for name in ("query_norm", "key_norm")}
    return Artifact("seer", tensors, arguments, model.layers, heads, "random gates", kv_heads=heads, head_dim=dim)
