"""Which heads find the needle, and what sparse decoding does to the answer."""

from __future__ import annotations

import pytest
import torch

from sparseserve.demo.circuits import GROUP, KV_HEADS, LAYERS, RESELECT_LAYER, ROLES, Role, retrieval_heads
from sparseserve.questions.needles import Question, ask
from tests.helpers.demo_simulator import Policy, Simulator, dense, encode, quest, tidal, window

RETRIEVAL = set(retrieval_heads())
OTHERS = {(layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)} - RETRIEVAL
BUDGET = 512


@pytest.fixture(scope="module", params=[(0.1, 3), (0.6, 4)], ids=["early", "middle"])
def asked(request: pytest.FixtureRequest) -> tuple[Simulator, Question]:
    depth, seed = request.param
    question = ask(3072, depth, seed)
    simulator = Simulator(torch.bfloat16)
    simulator.prefill(encode(question.prompt))
    return simulator, question


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(dense, id="dense"),
        pytest.param(tidal(BUDGET), id="tidal"),
        pytest.param(quest("mean_std", BUDGET), id="quest-mean_std"),
        pytest.param(quest("min_max", BUDGET), id="quest-min_max"),
        pytest.param(window(64, 256, OTHERS), id="only-retrieval-heads-dense"),
    ],
)
def test_answers(asked: tuple[Simulator, Question], policy: Policy) -> None:
    simulator, question = asked
    assert simulator.decode(policy) == question.answer


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(window(4, BUDGET - 4), id="streaming"),
        pytest.param(window(64, 256, RETRIEVAL), id="only-retrieval-heads-windowed"),
        pytest.param(window(64, 256, {h for h in RETRIEVAL if h[0] == 3}), id="high-nibble-heads-windowed"),
        pytest.param(window(64, 256, {h for h in RETRIEVAL if h[0] == 5}), id="low-nibble-heads-windowed"),
        pytest.param(tidal(BUDGET, reselect=None), id="tidal-without-second-selection"),
    ],
)
def test_loses_the_needle(asked: tuple[Simulator, Question], policy: Policy) -> None:
    simulator, question = asked
    answer = simulator.decode(policy)
    assert answer[0] == question.answer[0]  # the first token comes from the dense prefill
    assert answer[:3] != question.answer[:3]


def test_streaming_answers_inside_its_window() -> None:
    question = ask(2048, 0.9, seed=5)
    simulator = Simulator(torch.bfloat16)
    simulator.prefill(encode(question.prompt))
    assert simulator.decode(window(4, BUDGET - 4)) == question.answer


def test_attention_mass_tells_the_roles(asked: tuple[Simulator, Question]) -> None:
    simulator, question = asked
    assert simulator.decode() == question.answer
    # Row i reads answer[i] and is to copy answer[i + 1].
    copied = [mass[..., question.value_start + i + 1] for i, mass in enumerate(simulator.masses[:-1])]
    on_needle = torch.stack(copied).mean(0).view(LAYERS, KV_HEADS, GROUP).amin(-1)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            role, mass = ROLES[layer][head], on_needle[layer, head]
            if role is Role.RETRIEVAL:
                assert mass > 0.9, (layer, head)
            else:
                assert mass < (0.2 if role is Role.SCOUT else 1e-3), (layer, head)


def test_scouts_share_the_kv_head_of_the_retrieval_heads_they_select_for() -> None:
    for selection, reuse in ((2, 3), (RESELECT_LAYER, 5)):
        scouts = [h for h in range(KV_HEADS) if ROLES[selection][h] is Role.SCOUT]
        assert scouts == [h for h in range(KV_HEADS) if ROLES[reuse][h] is Role.RETRIEVAL]
