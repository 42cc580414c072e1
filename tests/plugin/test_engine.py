"""One engine with few pages, under every policy in turn: preemption, chunked prefill, budgets over the context."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseserve.config import to_dict
from sparseserve.demo.build import build
from sparseserve.demo.circuits import RESELECT_LAYER
from sparseserve.demo.questions import ask
from sparseserve.policies import Dense, Policy, Quest, Streaming, Tidal
from sparseserve.testing.engine import rebind
from sparseserve.types import Bound, Scope

pytestmark = pytest.mark.e2e

PAGES, MAX_TOKENS = 48, 1280
POLICIES: dict[str, Policy] = {
    "dense": Dense(min_tokens=0),
    "streaming": Streaming(min_tokens=0, recent_tokens=508),
    "quest": Quest(min_tokens=0, budget_tokens=768),
    "quest-min_max": Quest(min_tokens=0, budget_tokens=512, bound=Bound.MIN_MAX),
    "tidal": Tidal(min_tokens=0, budget_tokens=512, reselect_layer=RESELECT_LAYER),
    "tidal-query_head": Tidal(
        min_tokens=0, budget_tokens=512, reselect_layer=RESELECT_LAYER, scope=Scope.QUERY_HEAD, unit_tokens=16
    ),
}
# long values, so that answers grow over page boundaries while others wait
QUESTIONS = [ask(1100 + 3 * seed, 0.93, seed, distractors=0, value_length=90) for seed in range(12)]


class Engine:
    """vLLM's offline API with a policy that can be exchanged."""

    def __init__(self, model: Path) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        from vllm import LLM

        self.llm = LLM(
            str(model),
            max_model_len=MAX_TOKENS,
            max_num_seqs=16,
            max_num_batched_tokens=1500,  # prompts are chunked, and prefill shares its steps with decodes
            num_gpu_blocks_override=PAGES,
            enforce_eager=True,
            disable_log_stats=False,
            additional_config={"sparseserve": to_dict(Quest())},
        )

    def bind(self, policy: Policy) -> None:
        self.llm.collective_rpc(rebind, args=(policy,))
        self.llm.reset_prefix_cache()

    def answer(self, prompts: list[str]) -> list[str]:
        from vllm import SamplingParams

        outputs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def metric(self, name: str) -> float:
        value: Any = sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)
        return float(value)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tmp_path_factory.mktemp("engine") / "demo"
    build(model)
    yield Engine(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_requests_answer_as_alone(engine: Engine, policy: str) -> None:
    engine.bind(POLICIES[policy])
    preemptions = engine.metric("vllm:num_preemptions")
    together = engine.answer([question.prompt for question in QUESTIONS])
    assert engine.metric("vllm:num_preemptions") > preemptions
    engine.llm.reset_prefix_cache()
    alone = [engine.answer([question.prompt])[0] for question in QUESTIONS]
    assert together == alone == [question.answer for question in QUESTIONS]
    assert engine.metric("vllm:kv_cache_usage_perc") == engine.metric("vllm:num_requests_running") == 0


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "dense"])
def test_a_budget_over_the_context_is_dense(engine: Engine, policy: str) -> None:
    prompts = [question.prompt for question in QUESTIONS[:3]]
    engine.bind(Dense(min_tokens=0))
    dense = engine.answer(prompts)
    budget = {"recent_tokens": 4096} if policy == "streaming" else {"budget_tokens": 4096}
    engine.bind(POLICIES[policy].model_copy(update=budget))
    assert engine.answer(prompts) == dense
