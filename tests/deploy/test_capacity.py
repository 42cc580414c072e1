"""The runbook's table of KV tokens per GiB, computed again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparseserve.footprint.planned import plan_model
from sparseserve.model import ModelShape
from sparseserve.policies import S2, Dense, Hip, Moa, Policy, Quest, Retrieval, Streaming, Tidal
from sparseserve.types import HeadShape
from tests.helpers.paths import DEPLOY

LLAMA_8B = ModelShape("Llama-3.1-8B", layers=32, heads=HeadShape(8, 4, 128), max_len=131072, page_size=64)
LENGTHS = (8192, 32768, 131072)
ROWS = re.findall(r"^\| (`.*?) \| (\d+) \| (\d+) \| (\d+) \|", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)
TOLD = {name: tuple(map(int, numbers)) for names, *numbers in ROWS for name in re.findall(r"`(\w+)`", names)}


@pytest.fixture
def policies(tmp_path: Path) -> dict[str, Policy]:
    """Half of the KV heads retrieve; every head of moa keeps a quarter."""
    heads, plan = tmp_path / "heads.json", tmp_path / "moa.json"
    heads.write_text(json.dumps({str(layer): [0, 2, 4, 6] for layer in range(32)}))
    plan.write_text(json.dumps({"alphas": [[0] * 32] * 32, "betas": [[0.25] * 32] * 32}))
    return {
        "dense": Dense(),
        "tidal": Tidal(reselect_layer=(13,)),
        "s2": S2(),
        "quest": Quest(),
        "hip": Hip(),
        "retrieval": Retrieval(artifact=str(heads)),
        "moa": Moa(artifact=str(plan)),
        "streaming": Streaming(),
    }


def test_the_table_is_what_the_policies_store(policies: dict[str, Policy]) -> None:
    def per_gib(policy: Policy) -> tuple[int, ...]:
        memory = plan_model(policy, LLAMA_8B, element_bytes=2).memory(0)
        return tuple(round(2**30 * length / memory.row(length).bytes) for length in LENGTHS)

    assert {name: per_gib(policy) for name, policy in policies.items()} == TOLD
