"""Every policy through vLLM on 8k tokens: which find the needle, and what a prefix hit changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseserve.demo import circuits, gates
from sparseserve.policies import S2, Hip, Moa, Policy, Quest, Retrieval, Seer, Streaming, Tidal
from sparseserve.questions.needles import ask
from sparseserve.testing.plans import all_heads, write_head_map, write_moa_plan
from tests.helpers.plugin.offline import Engine

pytestmark = pytest.mark.e2e

TOKENS = 8192
QUESTIONS = [ask(TOKENS, depth, seed) for depth, seed in ((0.1, 1), (0.5, 2))]
RETRIEVAL = set(circuits.retrieval_heads())


def demo_gates(path: Path) -> str:
    gates.build_gates(path)
    return str(path)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    folder = tmp_path_factory.mktemp("artifacts")
    hip: dict[str, Any] = {"budget_tokens": 2048, "sink_tokens": 64, "recent_tokens": 448}
    shared: dict[str, Any] = {"kv_memory": "shared"}  # pages are laid out when an engine starts
    window: dict[str, Any] = {"sink_tokens": 64, "recent_tokens": 448, **shared}
    plan = write_moa_plan(folder / "moa.json", lambda head: (0, 1 if head in RETRIEVAL else 0.1))
    known = write_head_map(folder / "heads.json", RETRIEVAL)
    others = write_head_map(folder / "others.json", all_heads() - RETRIEVAL)
    return {
        "quest": Quest(budget_tokens=1024),
        "tidal": Tidal(budget_tokens=1024, reselect_layer=(circuits.RESELECT_LAYER,)),
        # The needle's scores stand alone, which HiP's search is not made for: chunks must be small and searched anew.
        "hip": Hip(scope="kv_head", chunk_tokens=(64, 16, 2), refresh_steps=(1, 1, 1), wide_layers=0, **hip),
        "moa": Moa(artifact=plan, **shared),
        "retrieval": Retrieval(artifact=known, **window),
        "retrieval-compensated": Retrieval(artifact=known, compensate=True, **window),
        "retrieval-inverted": Retrieval(artifact=others, **window),
        "seer": Seer(artifact=demo_gates(folder / "gates.safetensors"), budget_tokens=1024),
        "s2": S2(local_blocks=8, stride=8),
        "streaming": Streaming(**shared),
    }


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine], policies: dict[str, Policy]) -> Engine:
    return start(policies.values(), max_model_len=TOKENS + 128, num_gpu_blocks_override=200, enforce_eager=True)


@pytest.mark.parametrize("name", ["quest", "tidal", "hip", "moa", "retrieval", "retrieval-compensated", "seer"])
def test_finds_the_needle_with_and_without_a_prefix_hit(engine: Engine, policies: dict[str, Policy], name: str) -> None:
    engine.bind(policies[name])
    together = engine.answer([question.prompt for question in QUESTIONS])
    hits = engine.metric("vllm:prefix_cache_hits")
    again = [engine.answer([question.prompt])[0] for question in QUESTIONS]
    assert engine.metric("vllm:prefix_cache_hits") > hits
    assert together == again == [question.answer for question in QUESTIONS]


@pytest.mark.parametrize("name", ["retrieval-inverted", "s2", "streaming"])
def test_what_is_not_read_is_not_found(engine: Engine, policies: dict[str, Policy], name: str) -> None:
    engine.rebind(policies[name])
    early = QUESTIONS[0]
    assert engine.answer([early.prompt])[0] != early.answer
