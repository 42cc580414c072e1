"""Artifacts for the demo model and deeper ones made of it, in the formats that people have them in."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

from sparseserve.demo import circuits

Head = tuple[int, int]  # layer, KV head


def all_heads(layers: int = circuits.LAYERS) -> set[Head]:
    """Every KV head of a model of `layers` layers."""
    return {(layer, head) for layer in range(layers) for head in range(circuits.KV_HEADS)}


def write_head_map(path: Path, heads: Collection[Head], layers: int = circuits.LAYERS) -> str:
    """RazorAttention's file of retrieval heads."""
    path.write_text(json.dumps({str(i): sorted(head for layer, head in heads if layer == i) for i in range(layers)}))
    return str(path)


def write_moa_plan(path: Path, span: Callable[[Head], tuple[float, float]], layers: int = circuits.LAYERS) -> str:
    """MoA's file; `span` gives alpha and beta to each query head of a KV head."""
    spans = [
        [span((layer, head)) for head in range(circuits.KV_HEADS) for _ in range(circuits.GROUP)]
        for layer in range(layers)
    ]
    alphas, betas = ([[pair[part] for pair in layer] for layer in spans] for part in (0, 1))
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return str(path)
