"""Writes the demo model, a `Qwen2ForCausalLM` whose weights are computed, not trained (see `circuits`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sparseserve.demo import circuits
from sparseserve.demo.circuits import GROUP, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB
from sparseserve.demo.tokenizer import tokenizer_config, tokenizer_json

MAX_TOKENS = 65536


def build(path: Path) -> None:
    """Writes config, weights (bfloat16), tokenizer and `retrieval_heads.json` into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(save(weights(), metadata={"format": "pt"}))
    for name, content in {
        "config.json": config(),
        "generation_config.json": {"bos_token_id": circuits.BOS_ID, "eos_token_id": circuits.EOS_ID},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(MAX_TOKENS),
        "retrieval_heads.json": ground_truth(),
    }.items():
        (path / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def config() -> dict[str, Any]:
    """Contents of config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": circuits.ROPE_THETA},
        "rope_theta": circuits.ROPE_THETA,
        "max_position_embeddings": MAX_TOKENS,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": circuits.BOS_ID,
        "eos_token_id": circuits.EOS_ID,
    }


def ground_truth() -> dict[str, Any]:
    """Contents of retrieval_heads.json: what every KV head is for."""
    return {
        "reselect_layer": circuits.RESELECT_LAYER,
        "query_heads_per_kv_head": GROUP,
        "retrieval_heads": [{"layer": layer, "kv_head": head} for layer, head in circuits.retrieval_heads()],
        "roles": [[role.value for role in roles] for roles in circuits.ROLES],
    }


def weights() -> dict[str, Tensor]:
    """The state dict of the model, bfloat16."""
    state = {
        "model.embed_tokens.weight": circuits.embedding(),
        "model.norm.weight": circuits.norm_weight(),
        "lm_head.weight": circuits.output_head(),
    }
    attentions = [circuits.gather_layer(), circuits.shift_layer(), *map(circuits.role_layer, range(2, LAYERS))]
    for index, attention in enumerate(attentions):
        layer = _layer(attention, fingerprints=index == 0)
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    return {name: tensor.bfloat16().contiguous() for name, tensor in state.items()}


def _layer(attention: circuits.Attention, fingerprints: bool) -> dict[str, Tensor]:
    gate, up, down = (t if fingerprints else torch.zeros_like(t) for t in circuits.fingerprint_mlp())
    return {
        "input_layernorm.weight": circuits.norm_weight(),
        "self_attn.q_proj.weight": attention.q.flatten(0, 1),
        "self_attn.q_proj.bias": attention.q_bias.flatten(),
        "self_attn.k_proj.weight": attention.k.flatten(0, 1),
        "self_attn.k_proj.bias": attention.k_bias.flatten(),
        "self_attn.v_proj.weight": attention.v.flatten(0, 1),
        "self_attn.v_proj.bias": torch.zeros(KV_HEADS * HEAD_DIM),
        "self_attn.o_proj.weight": attention.o.flatten(1),
        "post_attention_layernorm.weight": circuits.norm_weight(),
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": down,
    }
