"""From vLLM's configuration to ours."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope

from sparseserve.config import ADDITIONAL_CONFIG, from_dict
from sparseserve.model import ModelShape
from sparseserve.plugin.support.models import Rotation, check_rotation
from sparseserve.policies import Policy
from sparseserve.types import HeadShape

_latest: tuple[object, Policy] | None = None  # the latest settings, and what they ask for


def policy_of(vllm_config: VllmConfig | Namespace) -> Policy | None:
    """The policy that `additional_config["sparseserve"]` asks for; None leaves vLLM as it is.

    One object for all who ask about the same configuration, so that what it loads is loaded once.
    """
    global _latest
    config = vllm_config.additional_config
    settings = config.get(ADDITIONAL_CONFIG) if isinstance(config, Mapping) else None
    if settings is None:
        return None
    if _latest is None or _latest[0] is not settings:
        _latest = settings, from_dict(settings)
    return _latest[1]


def head_shape(layer: Attention) -> HeadShape:
    """The heads of an attention layer on this rank."""
    return HeadShape(layer.num_kv_heads, layer.num_heads // layer.num_kv_heads, layer.head_size)


def configured_heads(vllm_config: VllmConfig) -> HeadShape:
    """The heads of every attention layer on one rank, before there are layers."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_heads = model.get_num_kv_heads(parallel)
    return HeadShape(kv_heads, model.get_num_attention_heads(parallel) // kv_heads, model.get_head_size())


def model_shape(vllm_config: VllmConfig, heads: HeadShape, rank: int = 0) -> ModelShape:
    """The served model as policies see it on a tensor-parallel rank."""
    model = vllm_config.model_config
    config = Path(model.model) / "config.json"
    return ModelShape(
        name=model.model,
        layers=model.get_total_num_hidden_layers(),
        heads=heads,
        max_len=model.max_model_len,
        page_size=vllm_config.cache_config.block_size,
        rank=rank,
        ranks=vllm_config.parallel_config.tensor_parallel_size,
        rope=lambda dim: rope_table(vllm_config, dim),
        config_sha256=hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
    )


def rope_table(vllm_config: VllmConfig, head_dim: int) -> Tensor:
    """cos and sin [max_len, head_dim] fp32 of the model's rotary embedding, at another head dim if need be.

    Raises UnsupportedError for embeddings that are not plain rotations of halves over the whole head.
    """
    model = vllm_config.model_config
    parameters = getattr(model.hf_text_config, "rope_parameters", None)
    check_rotation(Rotation(model.model, parameters))
    with set_current_vllm_config(vllm_config, check_compile=False):
        rope = get_rope(head_dim, model.max_model_len, rope_parameters=parameters, dtype=torch.float32)
    check_rotation(Rotation(model.model, parameters, rope, head_dim))
    return rope.cos_sin_cache[: model.max_model_len].float()
