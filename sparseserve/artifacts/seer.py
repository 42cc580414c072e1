"""Decode gates of SeerAttention-R (arXiv 2506.08889): config.json with seerattn_* beside attn_gate_weights.pth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from torch import Tensor

from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.model import Dim, ModelConfig
from sparseserve.artifacts.read import Tokens, parse, read_json, refuse

WEIGHTS = "attn_gate_weights.pth"
KEY = re.compile(
    r"model\.layers\.(0|[1-9][0-9]{0,2})\.self_attn\.attn_gate\.attngate_(linear_q|linear_k|qnorm|knorm)\.weight"
)
NAMES = {"linear_q": "query", "linear_k": "key", "qnorm": "query_norm", "knorm": "key_norm"}
DECODE_GATES = (
    "decode gates (SeerAttention-Decode-*); prefill gates score blocks for queries pooled over 64 tokens, one query "
    "head at a time, and say nothing about a single token"
)
TAKE_DECODE = "take the decode gates of this model, or another policy where none are published"


class SeerConfig(ModelConfig):
    """What we need of the config.json; defaults are those of SeerAttention's own code."""

    seerattn_sparsity_method: Literal["threshold", "token_budget", "nz_ratio"] = "threshold"
    seerattn_token_budget: Tokens = 4096
    seerattn_threshold: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0
    seerattn_gate_block_size: Annotated[int, Field(ge=1, le=4096, strict=True)] = 64
    seerattn_gate_hidden_size: Dim = 128
    seerattn_q_head_pooling_type: Literal["Qproj"] = "Qproj"
    seerattn_k_seq_pooling_type: Literal["Kmaxminavg"] = "Kmaxminavg"
    seerattn_use_rope: Annotated[bool, Field(strict=True)] = True
    seerattn_use_qk_norm: Annotated[bool, Field(strict=True)] | None = None  # then as the weights are
    seerattn_start_layer: Tokens = 0
    base_model: str | None = None


SEER_CONFIG = TypeAdapter(SeerConfig)


def load(state: dict[Any, Any], path: Path, config_path: Path) -> Artifact:
    """The gates of every layer; `validate` checks their shapes."""
    tensors = _gates(state, path)
    config = _config(config_path)
    layers, heads = config.num_hidden_layers, config.heads
    if "query.0" in tensors and (shape := tuple(tensors["query.0"].shape))[1:2] != (heads.queries_per_kv,):
        refuse(path, "shape of query.0", shape, f"[H, G, D, E] with G = {heads.queries_per_kv} as in config.json")
    normed = config.seerattn_use_qk_norm
    arguments = {
        "block_size": config.seerattn_gate_block_size,
        "gate_dim": config.seerattn_gate_hidden_size,
        "budget_tokens": config.seerattn_token_budget,
        "threshold": config.seerattn_threshold,
        "method": config.seerattn_sparsity_method,
        "start_layer": config.seerattn_start_layer,
        "use_rope": config.seerattn_use_rope,
        "use_qk_norm": "query_norm.0" in tensors if normed is None else normed,
    }
    source = f"SeerAttention-R decode gates, {layers} layers x {heads.kv_heads} KV heads"
    return Artifact(
        "seer",
        tensors,
        arguments,
        layers,
        heads.kv_heads,
        source,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        model=config.base_model,
    )


def _config(path: Path) -> SeerConfig:
    content = read_json(path)
    if isinstance(content, dict) and "seerattn_gate_type" in content:
        refuse(path, "seerattn_gate_type", content["seerattn_gate_type"], DECODE_GATES, TAKE_DECODE)
    return parse(SEER_CONFIG, content, path, "the configuration of a decode gate with Qproj and Kmaxminavg")


def _gates(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in state.items():
        if "mask_linear_" in str(name):
            refuse(path, "weights", name, DECODE_GATES, TAKE_DECODE)
        if (match := KEY.fullmatch(str(name))) is None:
            refuse(path, "weights", name, "model.layers.N.self_attn.attn_gate.attngate_linear_q.weight and the like")
        if not isinstance(tensor, Tensor):
            refuse(path, name, type(tensor).__name__, "a tensor")
        tensors[f"{NAMES[match[2]]}.{match[1]}"] = tensor
    return tensors
