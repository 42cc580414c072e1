"""MoA plans (arXiv 2406.14909): `moa_alpha_beta.json`, {"alphas": [layer][query head], "betas": the same}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.read import Rows, parse, rectangle, refuse

PLAN_FILE = "moa_alpha_beta.json"  # as published, beside plans of baselines
RUNTIME = {"sink": 64, "minimum": 128, "granularity": 64}  # constants of MoA's own runtime; the file has none


class MoaPlan(BaseModel):
    """What is in the file."""

    model_config = ConfigDict(extra="forbid")

    alphas: Rows
    betas: Rows


PLAN = TypeAdapter(MoaPlan)


def recognise(content: dict[str, Any]) -> bool:
    """Whether JSON is a MoA plan, right or wrong."""
    return bool({"alphas", "betas"} & content.keys())


def load(content: dict[str, Any], path: Path) -> Artifact:
    """The plan, alpha and beta [L, Hq]."""
    plan = parse(PLAN, content, path, "alphas and betas as [layer][query head] numbers")
    layers, heads = rectangle(plan.alphas, path, "alphas")
    if (shape := rectangle(plan.betas, path, "betas")) != (layers, heads):
        refuse(path, "betas", "{} x {}".format(*shape), f"{layers} x {heads}, as alphas are")
    tensors = {
        "alpha": torch.tensor(plan.alphas, dtype=torch.float64),
        "beta": torch.tensor(plan.betas, dtype=torch.float64),
    }
    source = f"MoA plan, {layers} layers x {heads} query heads"
    return Artifact("moa", tensors, dict(RUNTIME), layers, heads, source)
