"""How many tokens fit: the runbook's table of KV tokens for each GiB, computed from the policies."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.markdown import table
from sparseserve.footprint.planned import plan_model
from sparseserve.footprint.stores import Memory
from sparseserve.model import ModelShape
from sparseserve.policies import POLICIES
from sparseserve.types import HeadShape

LLAMA_8B = ModelShape("Llama-3.1-8B", layers=32, heads=HeadShape(8, 4, 128), max_len=131072, page_size=64)
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}
ELEMENT_BYTES = 2
# Artifacts that the table supposes, and what they say.
HEADS = {str(layer): [0, 2, 4, 6] for layer in range(LLAMA_8B.layers)}
PLAN = {"alphas": [[0] * 32] * 32, "betas": [[0.25] * 32] * 32}
SUPPOSED = {
    "retrieval": (HEADS, "if half of the KV heads are retrieval heads"),
    "moa": (PLAN, "if every head keeps a quarter of the row"),
}


def capacity() -> str:
    """A row for every policy; those that store the same share one."""
    with TemporaryDirectory() as folder:
        names: dict[tuple[str, ...], list[str]] = {}
        for name in POLICIES:
            names.setdefault(_row(name, Path(folder)), []).append(f"`{name}`")
    return table(("policy", *LENGTHS, ""), *((", ".join(same), *cells) for cells, same in names.items()))


def _row(name: str, folder: Path) -> tuple[str, ...]:
    """Tokens for each GiB at every length, and a remark."""
    cls = POLICIES[name]
    if name not in SUPPOSED and not cls.has_defaults():
        return ("",) * len(LENGTHS) + ("what its artifact says: ask `explain`",)
    artifact, remark = SUPPOSED.get(name, (None, ""))
    path = folder / f"{name}.json"
    path.write_text(json.dumps(artifact))
    policy = cls() if artifact is None else cls.model_validate({"artifact": str(path)})
    memory = plan_model(policy, LLAMA_8B, ELEMENT_BYTES).memory(0)
    tokens = [str(round(2**30 * length / memory.row(length).bytes)) for length in LENGTHS.values()]
    return (*tokens, remark or _remark(memory))


def _remark(memory: Memory) -> str:
    if memory.page_state_bytes:
        return "with what it keeps of pages"
    return "a row costs the same at any length" if len({memory.row(n).bytes for n in LENGTHS.values()}) == 1 else ""
