"""Options of requests: what reaches vLLM, and what is refused with which words."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

pytestmark = pytest.mark.vllm

COMPLETIONS = "/v1/completions"


def xargs(**keys: Any) -> dict[str, Any]:
    return {"model": "demo", "vllm_xargs": keys}


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations"])
@pytest.mark.parametrize(
    ("ending", "keys"),
    [
        ("dense", {"sparse_policy": "dense"}),
        ("default", {"sparse_policy": "default"}),
        ("budget-1024", {"sparse_budget_tokens": 1024}),
    ],
)
def test_an_alias_is_the_name_and_its_keys(front: Any, path: str, ending: str, keys: dict[str, Any]) -> None:
    server = front()
    body = {"model": f"demo@{ending}", "prompt": "\u00e4", "vllm_xargs": {"session_id": "s"}}
    assert server.post(path, body).status_code == 200
    assert server.bodies == [{"model": "demo", "prompt": "\u00e4", "vllm_xargs": {"session_id": "s", **keys}}]
    assert int(server.requests[0].headers["content-length"]) == len(json.dumps(server.bodies[0]))


@pytest.mark.parametrize("served", [("demo", "demo@dense", "demo@budget-512"), ("demo", "other@home")])
def test_names_that_the_launcher_listed_are_aliases_and_names_of_the_user_are_names(
    front: Any, served: tuple[str, ...]
) -> None:
    server = front(served=served)
    server.post(COMPLETIONS, {"model": served[1]})
    alias = {"model": "demo", "vllm_xargs": {"sparse_policy": "dense"}}
    assert server.bodies == [alias if served[1] == "demo@dense" else {"model": "other@home"}]


def test_token_requests_carry_options_in_their_sampling_params(front: Any) -> None:
    server = front()
    server.post("/inference/v1/generate", {"model": "demo@dense", "token_ids": [1], "sampling_params": {"top_k": 1}})
    assert server.bodies == [
        {
            "model": "demo",
            "token_ids": [1],
            "sampling_params": {"top_k": 1, "extra_args": {"sparse_policy": "dense"}},
        }
    ]
    wrong = server.post("/inference/v1/generate", xargs(sparse_policy="dense"))
    assert wrong.status_code == 400 and "belongs in sampling_params.extra_args" in wrong.json()["error"]["message"]


def test_an_alias_in_the_header_of_sagemaker_is_refused(front: Any) -> None:
    """That header replaces the model behind us: the alias would be served without its choice."""
    server, header = front(), "X-Amzn-SageMaker-Adapter-Identifier"
    refused = server.post("/invocations", {"model": "demo"}, headers={header: "demo@dense"})
    assert refused.status_code == 400 and "demo@dense is refused" in refused.json()["error"]["message"]
    assert server.post("/invocations", {"model": "demo"}, headers={header: "adapter"}).status_code == 200


def test_batches_of_chats_hand_on_their_xargs() -> None:
    """vLLM's schema of a batch does not name vllm_xargs, but keeps what it does not know."""
    batch = BatchChatCompletionRequest(
        messages=[[{"role": "user", "content": "x"}]], vllm_xargs={"sparse_policy": "dense"}
    )
    chat = batch.to_chat_completion_request([{"role": "user", "content": "x"}])
    assert chat.vllm_xargs == {"sparse_policy": "dense"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (xargs(sparse_policy="densee"), ["sparse_policy = densee", "default, dense", "Did you mean 'dense'"]),
        (xargs(sparse_budget_tokens=4096), ["sparse_budget_tokens = 4096", "to 2048", "max_budget_tokens"]),
        (xargs(sparse_budget_tokens="512"), ["sparse_budget_tokens = 512", "whole number"]),
        (xargs(sparse_budget_tokens=True), ["sparse_budget_tokens = True", "whole number"]),
        (xargs(sparse_policy="dense", sparse_budget_tokens=512), ["drop one of"]),
        (xargs(sparse_polcy="dense"), ["sparse_polcy = dense", "Did you mean 'sparse_policy'"]),
        (xargs(budget_tokens=512), ["budget_tokens = 512", "Did you mean 'sparse_budget_tokens'"]),
        (xargs(top_a=0.1), ["top_a = 0.1", "one of sparse_policy, sparse_budget_tokens"]),
        ({"model": "demo", "sparse_policy": "dense"}, ["sparse_policy = dense", '{"vllm_xargs": {"sparse_policy"']),
        ({"model": "demo", "sparse_budget": 5}, ["sparse_budget = 5", "vllm_xargs"]),
        ({"model": "demo@densee"}, ["model = demo@densee", "Did you mean 'demo@dense'"]),
        ({"model": "demo@budget-9"}, ["sparse_budget_tokens = 9", "to 2048"]),
        (xargs(sparse_policy="default") | {"model": "demo@dense"}, ["sparse_policy", "demo@dense is a choice already"]),
        ({"model": "demo@dense", "use_beam_search": True}, ["use_beam_search = True", "drop one of them"]),
    ],
)
def test_what_cannot_be_had_is_refused_in_vllms_schema(front: Any, body: dict[str, Any], told: list[str]) -> None:
    server = front()
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 400 and server.bodies == []
    error = ErrorResponse.model_validate(response.json()).error
    assert (error.type, error.code) == ("BadRequestError", 400)
    assert [words for words in told if words not in error.message] == []


def test_the_messages_api_has_an_error_schema_of_its_own(front: Any) -> None:
    error = front().post("/v1/messages", xargs(sparse_policy="no")).json()
    assert error["type"] == "error" and "sparse_policy = no" in error["error"]["message"]


@pytest.mark.parametrize(("key", "status"), [("top_a", 200), ("sparse_polcy", 400), ("budget_tokens", 400)])
def test_keys_of_logits_processors_pass_unless_they_look_like_ours(front: Any, key: str, status: int) -> None:
    assert front(logits_processors=["a.B"]).post(COMPLETIONS, xargs(**{key: 1})).status_code == status


@pytest.mark.parametrize("path", ["/generative_scoring", "/v1/systemone", "/cohere/v2/chat"])
def test_routes_without_a_place_for_options_say_so(front: Any, path: str) -> None:
    server = front()
    assert server.post(path, {"model": "demo"}).status_code == 200
    for body in ({"model": "demo@dense"}, xargs(sparse_policy="dense"), {"sparse_policy": "dense"}):
        message = server.post(path, body).json()["error"]["message"]
        assert "no place for a choice" in message and "/v1/chat/completions" in message


def test_forms_are_read_too(front: Any) -> None:
    client, path = front().client, "/v1/audio/transcriptions"
    wav = {"file": ("a.wav", b"RIFF")}
    assert client.post(path, data={"model": "demo"}, files=wav).status_code == 200
    for form in ({"model": "demo@dense"}, {"model": "demo", "vllm_xargs": '{"sparse_policy": "dense"}'}):
        assert client.post(path, data=form, files=wav).status_code == 400


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_counting_tokens_takes_aliases(front: Any, path: str) -> None:
    server = front()
    server.post(path, {"model": "demo@budget-300"})
    assert server.bodies == [{"model": "demo"}]


@pytest.mark.parametrize(
    "body", [{"model": "demo@dense"}, xargs(sparse_policy="default"), xargs(sparse_budget_tokens=512)]
)
def test_a_server_may_take_no_choices(front: Any, body: dict[str, Any]) -> None:
    server = front({"per_request": False})
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 400 and "per_request=false" in response.json()["error"]["message"]
    assert server.post(COMPLETIONS, {"model": "demo"}).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[1]",
        b'{"model": 3}',
        b'{"vllm_xargs": "x"}',
        b"[" * 100_000,
        b'{"model":  "demo", "vllm_xargs": null}',
        b"",
    ],
)
def test_other_bodies_reach_vllm_to_the_byte(front: Any, raw: bytes) -> None:
    server = front()
    assert server.client.post(COMPLETIONS, content=raw).status_code == 200
    assert asyncio.run(server.requests[0].body()) == raw
