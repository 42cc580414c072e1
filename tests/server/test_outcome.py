"""usage.sparsity in answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from front_app import CHUNKS, Engine, stream
from starlette.responses import JSONResponse, Response

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
    for headers in ({}, {}, {"X-Request-Id": "mine"}):
        server.post(PATH, {"model": "demo"}, headers=headers)
    seen = [request.headers["x-request-id"] for request in server.requests]
    assert server.engine.asked == [("sparseserve_outcome", (name,)) for name in seen]
    assert len(set(seen)) == 3 and seen[2] == "mine" and all(name.isalnum() for name in seen)


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
