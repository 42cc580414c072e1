"""What is refused of models: attention that is not plain softmax attention over separate keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseserve.plugin.support.refusal import USE_VLLM, WITHOUT_US, Refusal, Subject, problems, refuse
from sparseserve.vllm_version import is_quantized

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

FULL_ATTENTION = {"attention", "full_attention"}


@dataclass(frozen=True, slots=True)
class Model(Subject):
    """A model, as its config.json tells."""

    config: ModelConfig

    def with_(self, what: str) -> str:
        """The model's name, and what is wrong with it."""
        return f"{self.config.model} ({what})"


@dataclass(frozen=True, slots=True)
class Layer(Subject):
    """A layer's attention, as vLLM built it."""

    layer: str
    impl: CPUAttentionBackendImpl | FlashAttentionImpl


@dataclass(frozen=True, slots=True)
class Rotation(Subject):
    """A model's rotary embedding, as policies with gates undo it."""

    model: str
    parameters: Any
    rope: Any = None  # vLLM's embedding, for heads of `head_dim`
    head_dim: int = 0


def check_rotation(rotation: Rotation) -> None:
    """Raise UnsupportedError for an embedding that is not a plain rotation of halves over the whole head."""
    refuse(problems(ROTATIONS, rotation))


def _not_generating(model: Model) -> object:
    return model.config.runner_type != "generate" and model.config.runner_type


def _latent(model: Model) -> object:
    return model.config.use_mla and model.with_("MLA")


def _not_decoding(model: Model) -> object:
    kind = model.config.attn_type
    if kind != "decoder":
        return model.with_(kind.replace("_", " "))
    return model.config.has_noops and model.with_("layers without attention")


def _windowed(model: Model) -> object:
    config = model.config
    window = config.get_sliding_window()
    layers = set(getattr(config.hf_text_config, "layer_types", None) or ()) - FULL_ATTENTION
    if config.disable_sliding_window:
        layers.discard("sliding_attention")
    what = " and ".join(sorted(layers)) or (f"sliding window of {window} tokens" if window else "")
    return what and model.with_(what)


def _biased(model: Model) -> object:
    capped = getattr(model.config.hf_text_config, "attn_logit_softcapping", None)
    return (model.config.uses_alibi or capped) and model.with_("ALiBi or capped logits")


def _more_than_softmax(layer: Layer) -> str:
    impl = layer.impl
    extras = {
        "sliding window": impl.sliding_window not in (-1, (-1, -1)),
        "ALiBi": impl.alibi_slopes is not None,
        "capped logits": impl.logits_soft_cap != 0,
        "attention sinks": impl.sinks is not None,
        "quantized KV cache": is_quantized(impl.kv_cache_dtype),
    }
    return " and ".join(extra for extra, there in extras.items() if there)


def _unrotated(rotation: Rotation) -> object:
    return not rotation.parameters and rotation.model


def _partly_rotated(rotation: Rotation) -> object:
    rope = rotation.rope
    plain = rope is None or (
        rope.rotary_dim == rotation.head_dim and rope.is_neox_style and rope.cos_sin_cache.dim() == 2
    )
    return not plain and rotation.parameters


MODELS: tuple[Refusal[Model], ...] = (
    Refusal("pooling models", "--runner", _not_generating, "generate: only decoding reads the KV cache", USE_VLLM),
    Refusal(
        "MLA",
        "model",
        _latent,
        "attention with separate keys and values (MHA, GQA, MQA)",
        USE_VLLM,
    ),
    Refusal(
        "encoders, and layers without attention",
        "model",
        _not_decoding,
        "decoder-only attention in every layer",
        USE_VLLM,
    ),
    Refusal(
        "sliding windows and hybrid models",
        "model",
        _windowed,
        "full attention in every layer",
        "add --disable-sliding-window, which limits the context to the window",
    ),
    Refusal("ALiBi, capped logits", "model", _biased, "plain softmax attention", USE_VLLM),
)
LAYERS: tuple[Refusal[Layer], ...] = (
    Refusal(
        "layers whose attention is another than config.json says",
        "{layer}",
        _more_than_softmax,
        "plain softmax attention",
        WITHOUT_US,
        where="worker",
    ),
)
ROTATIONS: tuple[Refusal[Rotation], ...] = (
    Refusal(
        "gates in a model without rotary embedding",
        "model",
        _unrotated,
        "a model with rotary position embedding",
        "take a policy without gates",
        where="both",
    ),
    Refusal(
        "gates under partial or interleaved rotations",
        "rope_parameters",
        _partly_rotated,
        "a rotary embedding of the whole head, in halves",
        "take a policy without gates",
        where="both",
    ),
)
