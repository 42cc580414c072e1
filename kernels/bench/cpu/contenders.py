"""What decode.py measures: a deep model that still answers, every policy with its artifacts, and the prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sparseserve.demo import circuits
from sparseserve.demo.build import build
from sparseserve.demo.gates import build_gates
from sparseserve.policies import POLICIES, Policy
from sparseserve.questions.needles import prose
from sparseserve.testing.plans import all_heads, write_head_map, write_moa_plan

BUDGET, LARGE_BUDGET = 1024, 2048
FAR, NEAR = ("Galedu", "7KQ2XW9B4T3MZ1PC"), ("Torvik", "R5H8J0VD6LYN2SGE")
FAR_AT = 2600  # tokens; not among the lowest units, which a policy takes when all scores are equal
SPANS = [(1024, 0), (0, 0.25), (-1024, 0.5), (0, 0.5)]  # of MoA's published plans


def deep_model(path: Path, layers: int) -> None:
    """The demo model with inert layers on top (their output projections are zero), `layers` in all."""
    build(path)
    state = load_file(path / "model.safetensors")
    template = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.3.")}
    for layer in range(circuits.LAYERS, layers):
        for name, tensor in template.items():
            inert = name.endswith(("o_proj.weight", "down_proj.weight"))
            state[name.replace(".3.", f".{layer}.")] = tensor * 0 if inert else tensor.clone()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))


def policies(folder: Path, layers: int) -> dict[str, Policy]:
    """What is measured, by the name of the policy and what is special; artifacts are written to `folder`."""
    measured = settings(folder, layers)
    named = {label.partition(",")[0] for label in measured}
    measured |= {name: {} for name in POLICIES if name not in named}
    return {label: _policy(label.partition(",")[0], values) for label, values in measured.items()}


def _policy(name: str, values: dict[str, Any]) -> Policy:
    cls = POLICIES[name]
    # An engine whose policy is exchanged cannot give heads pages of their own.
    shared = {"kv_memory": "shared"} if "kv_memory" in cls.model_fields else {}
    return cls(**shared | values)


def settings(folder: Path, layers: int) -> dict[str, dict[str, Any]]:
    """What differs from the defaults; policies that are not here are measured with theirs."""
    draw = random.Random(0)
    known = set(circuits.retrieval_heads())
    others = sorted(all_heads(layers) - known)
    half = known | set(draw.sample(others, (len(known) + len(others)) // 2 - len(known)))
    spans = {head: draw.choice(SPANS) for head in others} | dict.fromkeys(known, (0, 1))
    build_gates(folder / "gates.safetensors", layers)
    tidal: dict[str, Any] = {"budget_tokens": BUDGET, "reselect_layer": circuits.RESELECT_LAYER}
    large: dict[str, Any] = {"budget_tokens": LARGE_BUDGET}
    return {
        "dense": {},
        "streaming": {"sink_tokens": 4, "recent_tokens": BUDGET - 4},
        "quest": {"budget_tokens": BUDGET},
        "quest, no dense layers": {"budget_tokens": BUDGET, "dense_layers": 0},
        "tidal": tidal,
        "tidal, units of 32": tidal | {"unit_tokens": 32},
        "quest, 2048": large,
        "tidal, units of 32, 2048": tidal | large | {"unit_tokens": 32},
        "hip, 2048": large | {"sink_tokens": 128, "recent_tokens": 512, "wide_layers": 0},
        "seer, 2048": large | {"artifact": str(folder / "gates.safetensors")},
        "s2, 2048": {"local_blocks": 16, "stride": 32},
        "moa": {"artifact": write_moa_plan(folder / "moa.json", spans.__getitem__, layers)},
        "retrieval": {"artifact": write_head_map(folder / "heads.json", half, layers)},
    }


def needle(policy: Policy | None) -> tuple[str, str]:
    """The name and the value that a prompt asks for: the far one, unless the policy may lose it."""
    return FAR if policy is None or policy.finds_single_tokens else NEAR


def prompt(context: int, needle: tuple[str, str]) -> str:
    """A document of `context` tokens that holds both needles and asks for one; longer ones continue shorter ones."""
    at = min(FAR_AT, context // 4)
    far, near = (f" The pass key of {name} is {value}. " for name, value in (FAR, NEAR))
    question = f"\nThe pass key of {needle[0]} is "
    text = prose(context - 1 - len(far) - len(near) - len(question))
    return text[:at] + far + text[at:] + near + question
