"""SeerAttention-R gates for the built demo model, computed as its weights are.

The gate's dims are those of the heads. A gate passes the query on, and adds the maximum and twice the mean of a block's
keys: the bits of a key that matches, weighted by how many keys of the block have them. The size of fingerprints is left
out: a maximum over keys has no size. Keys of heads that look at near tokens are all the same before their rotation:
there the gate's own rotation, at the start of the block, makes the nearest blocks the best. The fastest rotary pairs do
not take part: they turn too far on the way to the block before.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparseserve.artifacts import Artifact, save
from sparseserve.demo.circuits import GROUP, HEAD_DIM, KV_HEADS, LAYERS, SIZE_DIM, rotary_frequencies

BLOCK = 64
SLOW = 0.2  # radians that a pair may turn in a block


def build_gates(path: Path, layers: int = LAYERS) -> None:
    """Write the gates of a model of `layers` layers to the file `path`."""
    save(gates(layers), path)


def gates(layers: int) -> Artifact:
    """The same gate for every layer and head."""
    seen = (rotary_frequencies() * BLOCK < SLOW).repeat(2).float()
    seen[SIZE_DIM] = 0
    query = torch.diag(seen).expand(KV_HEADS, GROUP, -1, -1)
    key = torch.cat([torch.diag(seen), torch.zeros(HEAD_DIM, HEAD_DIM), 2 * torch.diag(seen)])
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        tensors[f"query.{layer}"] = query.bfloat16().contiguous()
        tensors[f"key.{layer}"] = key.expand(KV_HEADS, -1, -1).bfloat16().contiguous()
    arguments = {
        "block_size": BLOCK,
        "gate_dim": HEAD_DIM,
        "budget_tokens": 1024,
        "threshold": 0.0,
        "method": "token_budget",
        "start_layer": 0,
        "use_rope": True,
        "use_qk_norm": False,
    }
    source = "gates of the built demo model"
    return Artifact("seer", tensors, arguments, layers, KV_HEADS, source, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
