"""The shape of a model as policies see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparseserve.errors import ConfigError
from sparseserve.types import HeadShape


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a policy must know of a model to plan its layers."""

    name: str
    layers: int  # L
    heads: HeadShape  # of one rank
    max_len: int  # tokens
    page_size: int  # P, tokens
    rank: int = 0  # this rank of the `ranks` that share the heads
    ranks: int = 1
    rope: Callable[[int], Tensor] | None = None  # head dim -> cos and sin [max_len, dim] fp32 of the rotary embedding
    config_sha256: str | None = None  # of the model's config.json, where it is known

    def my_heads(self, kv_heads: int) -> slice:
        """This rank's of `kv_heads` KV heads in all; with fewer heads than ranks, vLLM replicates them."""
        first = self.rank * kv_heads // self.ranks
        return slice(first, first + self.heads.kv_heads)

    def fits_kv_heads(self, kv_heads: int) -> bool:
        """Whether a model of `kv_heads` KV heads in all gives a rank as many as this one has."""
        replicated = self.heads.kv_heads == 1 and 0 < kv_heads < self.ranks and self.ranks % kv_heads == 0
        return replicated or kv_heads == self.heads.kv_heads * self.ranks

    def check_first_layers(self, key: str, count: int, default: int) -> None:
        """Raise ConfigError unless the model has `count` layers to be its first ones."""
        if count > self.layers:
            allowed = f"at most {self.layers} ({self.name} has {self.layers} layers)"
            raise ConfigError(key, count, allowed, remedy=f"give --set {key}={default}")

    def check_layer(self, key: str, layer: int, first: int = 0) -> None:
        """Raise ConfigError unless `layer` is a layer of the model, from `first` on."""
        if not first <= layer < self.layers:
            raise ConfigError(
                key,
                layer,
                allowed=f"a layer from {first} to {self.layers - 1} ({self.name} has {self.layers} layers)",
                remedy=f"give --set {key}=N with N in that range",
            )
