"""From vLLM's configuration to ours."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from sparseserve.config import ADDITIONAL_CONFIG, from_dict
from sparseserve.errors import Problem, UnsupportedError
from sparseserve.plan import ModelShape
from sparseserve.policies import Policy
from sparseserve.types import HeadShape


def policy_of(vllm_config: VllmConfig) -> Policy | None:
    """The policy that `additional_config["sparseserve"]` asks for; None leaves vLLM as it is."""
    config = vllm_config.additional_config
    settings = config.get(ADDITIONAL_CONFIG) if isinstance(config, Mapping) else None
    return None if settings is None else from_dict(settings)


def head_shape(layer: Attention) -> HeadShape:
    """The heads of an attention layer on this rank."""
    return HeadShape(layer.num_kv_heads, layer.num_heads // layer.num_kv_heads, layer.head_size)


def model_shape(vllm_config: VllmConfig, heads: HeadShape) -> ModelShape:
    """The served model as policies see it."""
    model = vllm_config.model_config
    return ModelShape(model.model, model.get_total_num_hidden_layers(), heads, model.max_model_len)


def check_attention(name: str, impl: CPUAttentionBackendImpl) -> None:
    """Raise UnsupportedError for attention that our kernels would compute as if it were plain softmax attention."""
    extras = {
        "sliding window": impl.sliding_window != -1,
        "ALiBi": impl.alibi_slopes is not None,
        "capped logits": impl.logits_soft_cap != 0,
        "attention sinks": impl.sinks is not None,
        "quantized KV cache": impl.is_fp8_kv_cache,
    }
    if found := [extra for extra, there in extras.items() if there]:
        remedy = "serve this model without additional_config.sparseserve"
        raise UnsupportedError(Problem(name, " and ".join(found), "plain softmax attention", remedy=remedy))
