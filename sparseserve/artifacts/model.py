"""A model's config.json, as far as an artifact must fit it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter

from sparseserve.artifacts.read import MAX_HEADS, MAX_LAYERS, parse, parse_json, read_bytes, refuse
from sparseserve.model import ModelShape
from sparseserve.types import HeadShape

Heads = Annotated[int, Field(ge=1, le=MAX_HEADS, strict=True)]
Dim = Annotated[int, Field(ge=1, le=1 << 20, strict=True)]


class ModelConfig(BaseModel):
    """The attention heads that a config.json of Hugging Face declares."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS, strict=True)]
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Dim | None = None
    hidden_size: Dim | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, strict=True)] | None = None

    @property
    def heads(self) -> HeadShape:
        """The heads of all ranks; G = 0 where the KV heads do not divide the query heads."""
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        group, rest = divmod(self.num_attention_heads, kv_heads)
        return HeadShape(kv_heads, 0 if rest else group, self.head_dim or self._even_head_dim)

    @property
    def _even_head_dim(self) -> int:
        return (self.hidden_size or 0) // self.num_attention_heads


MODEL_CONFIG = TypeAdapter(ModelConfig)


def read_model(path: Path) -> ModelShape:
    """The model of a config.json or of the folder that holds it, all of its heads on one rank."""
    file = path / "config.json" if path.is_dir() else path
    data = read_bytes(file)
    content = parse_json(data.decode(errors="replace"), file)
    config = parse(MODEL_CONFIG, text_model(content), file, "a model's config.json")
    if not config.heads.queries_per_kv or not config.heads.head_dim:
        refuse(file, "heads", config, "query heads that are a multiple of the KV heads, and their dim")
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    return ModelShape(
        name=name,
        layers=config.num_hidden_layers,
        heads=config.heads,
        max_len=config.max_position_embeddings or 0,
        page_size=0,  # not served
        config_sha256=sha256(data).hexdigest(),
    )


def text_model(content: Any) -> Any:
    """The part about the language model; models that also see or hear keep it in text_config."""
    nested = isinstance(content, dict) and "num_hidden_layers" not in content
    return content.get("text_config", content) if nested else content
