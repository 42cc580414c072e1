"""What an artifact says about every head, as numbers to read and to draw."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.moa import RUNTIME
from sparseserve.artifacts.s2 import TRAINED_OFFSET, first_blocks
from sparseserve.errors import ArtifactError, Problem


def moa_density(alpha: Tensor, beta: Tensor, length: int, group: int = 1) -> Tensor:
    """Tokens read / `length` [L, Hq / group] fp64 of the spans alpha + beta N, in a row of N = `length` tokens.

    A KV head reads what the widest of its `group` consecutive query heads reads.
    """
    spans: Tensor = (alpha + beta * length).clamp(min=RUNTIME["minimum"]).clamp(max=length)
    return spans.reshape(len(spans), -1, group).amax(-1) / length


def s2_first_blocks(artifact: Artifact) -> Tensor:
    """The first block of every query head's stride [L, Hq] fp64, NaN in dense layers.

    Models trained with the pattern keep the blocks j of head h with (j + h * step + 1) % stride == 0.
    """
    arguments = artifact.arguments
    heads, pattern = torch.arange(artifact.heads), (arguments["vert_stride"], arguments["homo_head"], TRAINED_OFFSET)
    blocks = first_blocks(heads, artifact.heads, *pattern).double().repeat(artifact.layers, 1)
    if every := arguments["dense_every"]:
        blocks[every - 1 :: every] = torch.nan
    return blocks


def head_map(artifact: Artifact, length: int) -> tuple[Tensor, str]:
    """A number for every head [L, heads] fp64 and what it means; ArtifactError for gates, which have none."""
    if artifact.kind == "moa":
        return _spans_read(artifact, length), f"share of {length} tokens that a query head reads"
    if artifact.kind == "retrieval":
        per = {"kv_head": "KV head", "query_head": "query head"}[artifact.arguments["per"]]
        return artifact.tensors["scores"], f"{artifact.arguments['scores']} score of a {per}"
    if artifact.kind == "s2":
        return s2_first_blocks(artifact), "first block of a query head's stride; dense layers are empty"
    allowed = "moa, retrieval or s2: gates decide at every step"
    raise ArtifactError(Problem("kind", artifact.kind, allowed, remedy="inspect it without --plot"))


def headline(artifact: Artifact, length: int) -> str:
    """The artifact in a few words and, where it means something, how much it reads."""
    return "; ".join([artifact.source, *_facts(artifact, length)])


def _facts(artifact: Artifact, length: int) -> list[str]:
    if artifact.kind == "moa":
        facts = [f"reads {float(_spans_read(artifact, length).mean()):.3f} of {length} tokens"]
        if artifact.kv_heads:
            density = _spans_read(artifact, length, artifact.heads // artifact.kv_heads)
            facts.append(f"{float(density.mean()):.3f} as KV heads")
        return facts
    if artifact.kind == "retrieval":
        scores = artifact.tensors["scores"]
        threshold = artifact.arguments["rule"].get("threshold")
        if threshold is None:
            return [f"{artifact.arguments['rule']['share']:.0%} of its KV heads read everything"]
        return [f"{int((scores >= threshold).sum())} of {scores.numel()} scores reach {threshold}"]
    return []


def _spans_read(artifact: Artifact, length: int, group: int = 1) -> Tensor:
    return moa_density(artifact.tensors["alpha"], artifact.tensors["beta"], length, group)
