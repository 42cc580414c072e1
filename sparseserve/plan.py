"""The shape of a model as policies see it."""

from __future__ import annotations

from dataclasses import dataclass

from sparseserve.errors import ConfigError
from sparseserve.types import HeadShape


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a policy must know of a model to plan its layers."""

    name: str
    layers: int  # L
    heads: HeadShape  # of one rank
    max_len: int  # tokens

    def check_layer(self, key: str, layer: int, first: int = 0) -> None:
        """Raise ConfigError unless `layer` is a layer of the model, from `first` on."""
        if not first <= layer < self.layers:
            raise ConfigError(
                key,
                layer,
                allowed=f"a layer from {first} to {self.layers - 1} ({self.name} has {self.layers} layers)",
                remedy=f"give --set {key}=N with N in that range",
            )
