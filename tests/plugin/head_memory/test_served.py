"""Heads that store only their windows, in a real engine: the tokens of transformers under the same mask."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention
from sparseserve.calibration.samples import document
from sparseserve.calibration.subject import Subject, decode, load
from sparseserve.footprint.groups import store_heads
from sparseserve.model import ModelShape
from sparseserve.policies import Moa, Policy, Retrieval, Streaming
from sparseserve.types import HeadShape
from tests.helpers.plugin import one_process

pytestmark = pytest.mark.e2e

MODEL = str(files("sparseserve.demo") / "trained")
LAYERS, HEADS, PAGE = 4, HeadShape(4, 2, 32), 32
FEW, MANY = 48, 320  # generated tokens; many make some of the requests wait
LENGTHS = [450, 600, 750]
SCRIPT = "tests.helpers.plugin.head_memory"


def policies(folder: Path) -> dict[str, Policy]:
    scores = [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]  # one layer without windows, one of nothing else
    (folder / "heads.json").write_text(
        json.dumps({str(i): [j for j, score in enumerate(row) if score] for i, row in enumerate(scores)})
    )
    spans = [[(64 + 16 * (layer + head), 0.1 * (head // 2)) for head in range(8)] for layer in range(LAYERS)]
    spans[0][:2] = [(0, 1), (0, 1)]
    alphas, betas = ([[span[part] for span in row] for row in spans] for part in (0, 1))
    (folder / "moa.json").write_text(json.dumps({"alphas": alphas, "betas": betas}))
    window: dict[str, Any] = {"sink_tokens": 40, "recent_tokens": 100}
    return {
        "retrieval": Retrieval(artifact=str(folder / "heads.json"), min_tokens=500, **window),
        "moa": Moa(artifact=str(folder / "moa.json"), sink_tokens=32, minimum_tokens=96, min_tokens=0),
        "streaming": Streaming(sink_tokens=4, recent_tokens=124, min_tokens=0),
    }


NAMES = ["retrieval", "moa", "streaming"]


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Policy]:
    made = policies(tmp_path_factory.mktemp("artifacts"))
    return lambda name: made[name]


@cache
def subject() -> Subject:
    return load(MODEL)


@cache
def prompts() -> list[list[int]]:
    """Texts, and one that begins as the last of them."""
    texts = [document(subject(), length, seed) for seed, length in enumerate(LENGTHS)]
    return [*texts, texts[2][:460] + texts[0][:100]]


def masked(policy: Policy, ids: Sequence[int]) -> list[int]:
    """transformers' greedy continuation, every head of every token attending to what the policy leaves it."""
    plans = policy.plans(ModelShape("trained", LAYERS, HEADS, 2048, PAGE))

    def attend(attention: Attention) -> Tensor | None:
        window = plans[attention.layer].window
        if window is None:
            return None

        def keep(first: int, last: int) -> Tensor:
            lengths = torch.arange(first + 1, last + 1, dtype=torch.int32)
            sink, start = window.spans(lengths)[..., None].unbind(-2)  # [T, Hs, 1]
            token = torch.arange(last)
            kept = (token < sink) | (token >= start) | (lengths <= policy.dense_up_to)[:, None, None]
            return kept.transpose(0, 1).repeat_interleave(HEADS.query_heads // kept.shape[1], 0)

        return attention.masked_output(keep)

    return decode(subject(), ids, FEW, attend, rows=len(ids))


def serve(policy: Policy, runs: list[dict[str, Any]], **engine: Any) -> dict[str, Any]:
    settings = {"max_model_len": 2048, "block_size": PAGE, "dtype": "float32", "max_num_seqs": 8}
    answer: dict[str, Any]
    answer, _ = one_process.ask(SCRIPT, MODEL, policy, settings | {"disable_log_stats": False} | engine, runs=runs)
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_the_same_mask(policy_of: Callable[[str], Policy], name: str) -> None:
    policy = policy_of(name)
    alone = [{"prompts": [ids], "keep": False, "tokens": FEW} for ids in prompts()]
    together = {"prompts": prompts(), "keep": False, "tokens": MANY}
    again = {"prompts": prompts(), "keep": True, "tokens": FEW}
    storage = store_heads(policy, ModelShape("trained", LAYERS, HEADS, 2048, PAGE))
    room = sum(sum(storage.pages(len(ids), PAGE)) for ids in prompts()) + 9  # all may start, not all may grow
    served = serve(policy, [*alone, together, again], num_gpu_blocks_override=room, max_num_batched_tokens=64)
    *solo, together, again = served["runs"]
    answers = [run["tokens"][0] for run in solo]
    assert answers == [masked(policy, ids) for ids in prompts()]
    assert [tokens[:FEW] for tokens in together["tokens"]] == again["tokens"] == answers
    assert again["hits"] > 0
    assert together["preemptions"] > 0 or name != "retrieval"
    assert not any(run["missing_blocks"] for run in served["runs"])


def test_chunks_of_a_prompt_do_not_matter(policy_of: Callable[[str], Policy]) -> None:
    run = {"prompts": prompts()[:2], "keep": False, "tokens": FEW}
    tokens = [
        serve(policy_of("retrieval"), [run], max_num_batched_tokens=size, dtype="bfloat16")["runs"][0]["tokens"]
        for size in (97, 2048)
    ]
    assert tokens[0] == tokens[1]
