"""One engine with few pages, under every policy in turn: preemption, chunked prefill, budgets over the context."""

from collections.abc import Callable
from typing import Any

import pytest

from sparseserve.demo import circuits
from sparseserve.demo.gates import build_gates
from sparseserve.policies import S2, BudgetPolicy, Dense, Hip, Moa, Policy, Quest, Retrieval, Seer, Streaming, Tidal
from sparseserve.questions.needles import ask
from sparseserve.testing.plans import write_head_map, write_moa_plan
from sparseserve.types import Bound, Scope
from tests.helpers.plugin.offline import Engine

pytestmark = pytest.mark.e2e

PAGES, MAX_TOKENS = 48, 1280
BUDGETED = ["quest", "quest-min_max", "tidal", "tidal-query_head", "hip", "seer"]
COMPARED_IN_FULL = {"quest"}
NAMES = ["dense", "streaming", *BUDGETED, "moa", "retrieval", "s2"]
# long values, so that answers grow over page boundaries while others wait
QUESTIONS = [ask(1100 + 3 * seed, 0.93, seed, distractors=0, value_length=90) for seed in range(12)]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    folder = tmp_path_factory.mktemp("artifacts")
    retrieval = set(circuits.retrieval_heads())
    plan = write_moa_plan(folder / "moa.json", lambda head: (0, 1) if head in retrieval else (64, 0.1))
    build_gates(folder / "gates.safetensors")
    shared: dict[str, Any] = {"kv_memory": "shared"}  # pages are laid out when an engine starts
    hip: dict[str, Any] = {"sink_tokens": 64, "recent_tokens": 192, "wide_layers": 0, "scope": "kv_head"}
    tidal: dict[str, Any] = {"budget_tokens": 512, "reselect_layer": circuits.RESELECT_LAYER}
    return {
        "dense": Dense(min_tokens=0),
        "streaming": Streaming(min_tokens=0, recent_tokens=508, **shared),
        "quest": Quest(min_tokens=0, budget_tokens=768),
        "quest-min_max": Quest(min_tokens=0, budget_tokens=512, bound=Bound.MIN_MAX),
        "tidal": Tidal(min_tokens=0, **tidal),
        "tidal-query_head": Tidal(min_tokens=0, scope=Scope.QUERY_HEAD, unit_tokens=16, **tidal),
        "hip": Hip(min_tokens=0, budget_tokens=768, chunk_tokens=(64, 16, 2), refresh_steps=(4, 2, 1), **hip),
        "seer": Seer(min_tokens=0, budget_tokens=768, artifact=str(folder / "gates.safetensors")),
        "moa": Moa(min_tokens=0, artifact=plan, **shared),
        "retrieval": Retrieval(
            min_tokens=0,
            artifact=write_head_map(folder / "heads.json", retrieval),
            recent_tokens=128,
            compensate=True,
            **shared,
        ),
        "s2": S2(min_tokens=0, local_blocks=8),
    }


def over_the_context(policy: Policy) -> Policy:
    """The policy with a budget that no row reaches."""
    key = "budget_tokens" if isinstance(policy, BudgetPolicy) else "recent_tokens"
    return policy.model_copy(update={key: 4096})


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine], policies: dict[str, Policy]) -> Engine:
    return start(
        [*policies.values(), over_the_context(policies["hip"])],
        max_model_len=MAX_TOKENS,
        max_num_batched_tokens=1500,  # prompts are chunked, and prefill shares its steps with decodes
        num_gpu_blocks_override=PAGES,
        enforce_eager=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_preempted_requests_answer_as_alone(engine: Engine, policies: dict[str, Policy], name: str) -> None:
    engine.bind(policies[name])
    preemptions = engine.metric("vllm:num_preemptions")
    together = engine.answer([question.prompt for question in QUESTIONS])
    assert engine.metric("vllm:num_preemptions") > preemptions
    engine.llm.reset_prefix_cache()
    answers = [question.answer for question in QUESTIONS]
    assert together == answers
    few = len(QUESTIONS) if name in COMPARED_IN_FULL else 4  # seconds each
    assert [engine.answer([question.prompt])[0] for question in QUESTIONS[:few]] == answers[:few]
    assert engine.metric("vllm:kv_cache_usage_perc") == engine.metric("vllm:num_requests_running") == 0


@pytest.mark.parametrize("name", ["streaming", *BUDGETED])
def test_a_budget_over_the_context_is_dense(engine: Engine, policies: dict[str, Policy], name: str) -> None:
    prompts = [question.prompt for question in QUESTIONS[:3]]
    engine.bind(policies["dense"])
    dense = engine.answer(prompts)
    engine.bind(over_the_context(policies[name]))
    assert engine.answer(prompts) == dense
