"""S2-Attention (arXiv 2407.17678): a pattern that a model was trained with, in blocksparse_* of its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from torch import Tensor

from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.model import ModelConfig
from sparseserve.artifacts.read import MAX_LAYERS, parse

TRAINED_OFFSET = 1  # of Phi-3-small's modeling code, which slides over query heads; DKernel has 0
Blocks = Annotated[int, Field(ge=1, le=1 << 20, strict=True)]


class S2Config(ModelConfig):
    """The fields of Phi-3-small."""

    blocksparse_block_size: Blocks
    blocksparse_num_local_blocks: Blocks
    blocksparse_vert_stride: Blocks
    blocksparse_homo_head_pattern: Annotated[bool, Field(strict=True)] = False
    dense_attention_every_n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS, strict=True)] | None = None


S2_CONFIG = TypeAdapter(S2Config)


def recognise(content: dict[str, Any]) -> bool:
    """Whether a config.json declares the pattern."""
    return any(key.startswith("blocksparse_") for key in content)


def first_blocks(heads: Tensor, total: int, stride: int, homo: bool, offset: int) -> Tensor:
    """The first block j of each of `heads`, of `total` in all, with (j + head * step + offset) % stride == 0.

    step = max(1, stride // total), 0 for patterns that are the same for every head (DKernel, arXiv 2407.17678).
    """
    step = 0 if homo else max(1, stride // total)
    return -(heads * step + offset) % stride


def load(content: dict[str, Any], path: Path) -> Artifact:
    """The pattern; it is the same in every layer and needs no tensors."""
    config = parse(S2_CONFIG, content, path, "a model's config.json with blocksparse_* fields")
    heads, layers = config.heads, config.num_hidden_layers
    arguments = {
        "block_size": config.blocksparse_block_size,
        "num_local_blocks": config.blocksparse_num_local_blocks,
        "vert_stride": config.blocksparse_vert_stride,
        "homo_head": config.blocksparse_homo_head_pattern,
        "dense_every": config.dense_attention_every_n_layers,
    }
    source = f"S2-Attention pattern, {layers} layers x {config.num_attention_heads} query heads"
    return Artifact(
        "s2",
        {},
        arguments,
        layers,
        config.num_attention_heads,
        source,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim or None,
    )
