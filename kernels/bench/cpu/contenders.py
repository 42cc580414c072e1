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
from sparseserve.policies import S2, Dense, Hip, Moa, Policy, Quest, Retrieval, Seer, Streaming, Tidal
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
    """What is measured, in engines whose policy is exchanged; artifacts are written to `folder`."""
    draw = random.Random(0)
    known = set(circuits.retrieval_heads())
    others = sorted(all_heads(layers) - known)
    half = known | set(draw.sample(others, (len(known) + len(others)) // 2 - len(known)))
    spans = {head: draw.choice(SPANS) for head in others} | dict.fromkeys(known, (0, 1))
    build_gates(folder / "gates.safetensors", layers)
    tidal: dict[str, Any] = {"budget_tokens": BUDGET, "reselect_layer": circuits.RESELECT_LAYER}
    large: dict[str, Any] = {"budget_tokens": LARGE_BUDGET}
    return {
        "dense": Dense(),
        "streaming": Streaming(sink_tokens=4, recent_tokens=BUDGET - 4, kv_memory="shared"),
        "quest": Quest(budget_tokens=BUDGET),
        "quest, no dense layers": Quest(budget_tokens=BUDGET, dense_layers=0),
        "tidal": Tidal(**tidal),
        "tidal, units of 32": Tidal(**tidal | {"unit_tokens": 32}),
        "quest, 2048": Quest(**large),
        "tidal, units of 32, 2048": Tidal(**tidal | large | {"unit_tokens": 32}),
        "hip, 2048": Hip(**large, sink_tokens=128, recent_tokens=512, wide_layers=0),
        "seer, 2048": Seer(**large, artifact=str(folder / "gates.safetensors")),
        "s2, 2048": S2(local_blocks=16, stride=32),
        "moa": Moa(artifact=write_moa_plan(folder / "moa.json", spans.__getitem__, layers), kv_memory="shared"),
        "retrieval": Retrieval(artifact=write_head_map(folder / "heads.json", half, layers), kv_memory="shared"),
    }


def prompt(context: int, needle: tuple[str, str]) -> str:
    """A document of `context` tokens that holds both needles and asks for one; longer ones continue shorter ones."""
    at = min(FAR_AT, context // 4)
    far, near = (f" The pass key of {name} is {value}. " for name, value in (FAR, NEAR))
    question = f"\nThe pass key of {needle[0]} is "
    text = prose(context - 1 - len(far) - len(near) - len(question))
    return text[:at] + far + text[at:] + near + question
