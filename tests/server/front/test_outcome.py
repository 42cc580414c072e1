"""usage.sparsity in answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from tests.helpers.server.front_app import CHUNKS, Engine, stream

pytestmark = pytest.mark.vllm
KNOWN = {"policy": "quest", "dense": False, "budget_tokens": 512, "recall": 0.9, "widened": 0, "reason": ""}
SAMPLING = {"recall_sample": 0.5}
PATH = "/v1/completions"


def test_an_answer_tells_the_worst_worker(front: Any) -> None:
    engine = Engine([None, KNOWN | {"recall": None}, KNOWN, KNOWN | {"recall": 0.95}])
    answer = front(SAMPLING, engine=engine).post(PATH, {"model": "demo"})
    assert answer.json() == {"id": "x", "usage": {"completion_tokens": 1, "sparsity": KNOWN}}


def test_workers_are_asked_by_the_id_that_vllm_sees(front: Any) -> None:
    server = front(SAMPLING)
    for headers in ({}, {}, {"X-Request-Id": "0"}, {"X-Request-Id": "0"}):
        server.post(PATH, {"model": "demo"}, headers=headers)
    seen = [request.headers["x-request-id"] for request in server.requests]
    asked = [name for _, (name,) in server.engine.asked]
    assert seen == [*asked[:2], *(f"0-{name}" for name in asked[2:])]
    assert len(set(asked)) == 4 and all(len(name) == 32 and name.isalnum() for name in asked)


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/responses", {}), ("/v1/chat/completions/batch", {}), (PATH, {"request_id": "mine"})]
)
def test_requests_that_are_named_otherwise_keep_their_names(front: Any, path: str, body: Any) -> None:
    server = front(SAMPLING, engine=Engine([KNOWN]))
    assert "sparsity" not in server.post(path, body).json()["usage"]
    assert server.engine.asked == [] and "x-request-id" not in server.requests[0].headers


def test_of_ranks_that_guard_their_own_heads_each_is_heard(front: Any) -> None:
    one = KNOWN | {"recall": 0.95, "dense": True, "reason": "recall", "widened": 1}
    answer = front(SAMPLING, engine=Engine([one, KNOWN])).post(PATH, {})
    assert answer.json()["usage"]["sparsity"] == one | {"recall": 0.9}


def test_of_a_stream_only_the_chunk_of_the_usage_changes(front: Any) -> None:
    server = front(SAMPLING, engine=Engine([KNOWN]), answer=stream)
    events = [line.removeprefix("data: ") for line in server.post(PATH, {}).text.split("\n\n") if line]
    *chunks, usage = map(json.loads, events[:-1])
    assert (chunks, events[-1]) == (CHUNKS[:-1], "[DONE]")
    assert usage == {"choices": [], "usage": {"completion_tokens": 2, "sparsity": KNOWN}}
    assert len(server.engine.asked) == 1


@pytest.mark.parametrize("outcomes", [[None], [], [{"recall": "high"}, {}], RuntimeError("busy")])
@pytest.mark.parametrize("streams", [False, True])
def test_no_outcome_leaves_the_answer_as_it_is(front: Any, outcomes: Any, streams: bool) -> None:
    plain, sampled = (
        front(policy, engine=Engine(outcomes), **({"answer": stream} if streams else {})).post(PATH, {})
        for policy in ({}, SAMPLING)
    )
    assert (sampled.status_code, sampled.content) == (200, plain.content)


@pytest.mark.parametrize(
    "answer",
    [
        Response(b"usage", media_type="text/plain"),
        Response(b"{", media_type="application/json"),
        JSONResponse([1]),
        JSONResponse({"usage": None}),
        JSONResponse({"usage": {}}, 400),
    ],
)
def test_other_answers_are_left_alone(front: Any, answer: Response) -> None:
    server = front(SAMPLING, engine=Engine([KNOWN]), answer=lambda request: answer)
    got = server.post(PATH, {})
    assert (got.status_code, got.content, server.engine.asked) == (answer.status_code, answer.body, [])


def test_a_server_that_measures_nothing_asks_nothing(front: Any) -> None:
    server = front(engine=Engine([KNOWN]))
    assert "sparsity" not in server.post(PATH, {}).json()["usage"] and server.engine.asked == []
