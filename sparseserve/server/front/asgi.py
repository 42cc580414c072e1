"""What our middleware shares: paths, header changes and errors in the schemas that clients know."""

from __future__ import annotations

from http import HTTPStatus

from pydantic import BaseModel
from starlette.responses import JSONResponse
from starlette.types import Scope
from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

RETRY_AFTER = {"Retry-After": "1"}  # seconds
ANTHROPIC = "/v1/messages"
# POST paths of vLLM that may run the model, with and without a place for our options.
INFERENCE = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    ANTHROPIC,
    "/invocations",
    "/inference/v1/generate",
    "/generative_scoring",
    "/v1/systemone",
    "/cohere/v2/chat",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
}


def path_of(scope: Scope) -> str:
    """The path as routes name it."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def is_post(scope: Scope) -> bool:
    """Whether this is a POST."""
    return scope["type"] == "http" and bool(scope["method"] == "POST")


def is_inference(scope: Scope) -> bool:
    """Whether this asks vLLM to run the model."""
    return is_post(scope) and path_of(scope) in INFERENCE


def set_header(scope: Scope, name: bytes, value: bytes) -> None:
    """Replace a header of the request; `name` is in lower case."""
    scope["headers"] = [(key, old) for key, old in scope["headers"] if key != name] + [(name, value)]


def error(
    scope: Scope, status: HTTPStatus, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error as vLLM words it, which stock clients raise with our message."""
    kind = "BadRequestError" if status is HTTPStatus.BAD_REQUEST else status.phrase
    stock = create_error_response(message, kind, status, param)
    answer: BaseModel = stock
    if path_of(scope).startswith(ANTHROPIC):
        answer = AnthropicErrorResponse(error=AnthropicError(type=stock.error.type, message=stock.error.message))
    return JSONResponse(answer.model_dump(), status, headers)
