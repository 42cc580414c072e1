"""Distilled gates as our artifact and in the layout that SeerAttention-R's authors publish."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from sparseserve.artifacts import Artifact
from sparseserve.artifacts.seer import NAMES, WEIGHTS
from sparseserve.calibration.seer.gate import Gates
from sparseserve.calibration.subject import Subject
from sparseserve.files import write_atomically

PLACEHOLDERS = {"budget_tokens": 4096, "threshold": 0.0, "method": "token_budget", "start_layer": 0}  # as published


def artifact(gates: Gates, subject: Subject, block: int, rope: bool) -> Artifact:
    """The gates in bfloat16, as published ones are."""
    heads, layers = subject.shape.heads, subject.shape.layers
    tensors = {
        f"{name}.{layer}": weight.detach()[layer].bfloat16().cpu().contiguous()
        for name, weight in gates.named_parameters()
        for layer in range(layers)
    }
    shape = {"block_size": block, "gate_dim": gates.key.shape[-1]}
    arguments = shape | PLACEHOLDERS | {"use_rope": rope, "use_qk_norm": gates.key_norm is not None}
    return Artifact(
        "seer",
        tensors,
        arguments,
        layers,
        heads.kv_heads,
        f"decode gates distilled from {subject.shape.name}, {layers} layers x {heads.kv_heads} KV heads",
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        model=subject.shape.name,
        config_sha256=subject.shape.config_sha256,
    )


def publish(gates: Artifact, subject: Subject, folder: Path) -> None:
    """Write config.json and attn_gate_weights.pth to `folder`; raises FileError."""
    published = {ours: theirs for theirs, ours in NAMES.items()}
    state = {}
    for name, tensor in gates.tensors.items():
        kind, layer = name.split(".")
        state[f"model.layers.{layer}.self_attn.attn_gate.attngate_{published[kind]}.weight"] = tensor
    weights = io.BytesIO()
    torch.save(state, weights)
    config = subject.model.config.to_dict() | _fields(gates.arguments) | {"base_model": gates.model}
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    write_atomically(folder / WEIGHTS, weights.getvalue())


def _fields(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "seerattn_sparsity_method": arguments["method"],
        "seerattn_token_budget": arguments["budget_tokens"],
        "seerattn_threshold": arguments["threshold"],
        "seerattn_gate_block_size": arguments["block_size"],
        "seerattn_gate_hidden_size": arguments["gate_dim"],
        "seerattn_q_head_pooling_type": "Qproj",
        "seerattn_k_seq_pooling_type": "Kmaxminavg",
        "seerattn_use_rope": arguments["use_rope"],
        "seerattn_use_qk_norm": arguments["use_qk_norm"],
        "seerattn_start_layer": arguments["start_layer"],
        "seerattn_sliding_window_size": 0,
        "seerattn_loss_slice_ratio": 0.5,
    }
