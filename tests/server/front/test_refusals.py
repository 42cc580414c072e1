"""A stream that vLLM refuses has the status of the refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import StreamingResponse

pytestmark = pytest.mark.vllm
PATH, BODY = "/v1/completions", {"model": "demo", "stream": True}


def stream(*events: Any) -> Any:
    """An answer of vLLM: an event for each chunk."""

    async def chunks() -> Any:
        for event in events:
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"

    return lambda request: StreamingResponse(chunks(), media_type="text/event-stream")


def failure(code: int) -> dict[str, Any]:
    return {"error": {"message": "no", "type": "ServiceUnavailableError", "param": None, "code": code}}


@pytest.mark.parametrize("code", [400, 503])
def test_a_first_event_that_is_an_error_is_the_answer(front: Any, code: int) -> None:
    answer = front(answer=stream(failure(code), "[DONE]")).post(PATH, BODY)
    assert answer.status_code == code and answer.json() == failure(code)
    assert ("retry-after" in answer.headers) == (code == 503)


def test_streams_that_begin_well_pass_as_they_are(front: Any) -> None:
    events = {"choices": [{"text": "a"}]}, failure(500), "[DONE]"
    answer = front(answer=stream(*events)).post(PATH, BODY)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "".join(f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events)


@pytest.mark.parametrize("event", ['{"error": "what"}', '{"error": {"code": 7}}', '{"error'])
def test_what_is_no_refusal_of_vllm_passes(front: Any, event: str) -> None:
    answer = front(answer=stream(event)).post(PATH, BODY)
    assert answer.status_code == 200 and answer.text == f"data: {event}\n\n"
