"""Artifacts as files, for policies that load one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sparseserve.artifacts import Artifact, save

_FOLDER = TemporaryDirectory()
_NUMBERS = count()


def saved(artifact: Artifact) -> str:
    """The path of a file with the artifact, which lives as long as the tests run."""
    path = Path(_FOLDER.name) / f"{next(_NUMBERS)}.safetensors"
    save(artifact, path)
    return str(path)


def moa_plan(alpha: Sequence[Sequence[float]], beta: Sequence[Sequence[float]]) -> str:
    """A MoA plan [L][Hq]."""
    tensors = {"alpha": torch.tensor(alpha, dtype=torch.float64), "beta": torch.tensor(beta, dtype=torch.float64)}
    arguments = {"sink": 64, "minimum": 128, "granularity": 64}
    return saved(Artifact("moa", tensors, arguments, layers=len(alpha), heads=len(alpha[0])))


def head_map(
    scores: Sequence[Sequence[float]],
    rule: dict[str, float] | None = None,
    per: str = "kv_head",
    sink_tokens: int | None = None,
    recent_tokens: int | None = None,
) -> str:
    """Scores [L][H or Hq] of retrieval heads."""
    arguments = {
        "scores": "sparseserve",
        "per": per,
        "sink_tokens": sink_tokens,
        "recent_tokens": recent_tokens,
        "rule": rule or {"threshold": 0.5},
    }
    tensors = {"scores": torch.tensor(scores, dtype=torch.float64)}
    return saved(Artifact("retrieval", tensors, arguments, layers=len(scores), heads=len(scores[0])))
