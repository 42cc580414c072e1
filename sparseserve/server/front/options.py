"""Options of requests: found in bodies, checked against the policy, put where vLLM hands them to the workers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from sparseserve.errors import ConfigError
from sparseserve.policies import Policy
from sparseserve.request_options import BUDGET, POLICY, RequestOptions, own_names, read_alias, read_options
from sparseserve.server.front.asgi import INFERENCE, error, is_post, path_of, set_header
from sparseserve.server.front.counters import choose
from sparseserve.server.front.limits import replay
from sparseserve.server.front.outcome import NAMED

OURS = (POLICY, BUDGET)
VLLMS = {"session_id", "kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"}  # keys that vLLM reads
ADAPTER = "x-amzn-sagemaker-adapter-identifier"
Place = tuple[str, ...]
XARGS: Place = ("vllm_xargs",)
DECODING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
ROUTES = " or ".join(DECODING)
PLACES: dict[str, Place] = {
    **dict.fromkeys(DECODING, XARGS),
    **{f"{path}/render": XARGS for path in DECODING},
    "/v1/chat/completions/batch": XARGS,
    "/invocations": XARGS,
    "/inference/v1/generate": ("sampling_params", "extra_args"),
}
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OptionReader:
    """Reads the options of requests to a server under `policy`."""

    policy: Policy
    keys_of_others: bool  # logits processors read keys that only they know

    def read(self, path: str, body: Body, names: Sequence[str]) -> tuple[RequestOptions, Body]:
        """The options, and the body as vLLM is to see it; ConfigError says what is wrong."""
        place = PLACES.get(path)
        _refuse_misplaced(body, place)
        model = body.get("model")
        name, chosen = self._alias(model, names) if isinstance(model, str) else (model, {})
        if place is None:
            if chosen and path in INFERENCE:
                allowed = f"{name}: {path} has no place for a choice"
                raise ConfigError("model", model, allowed, remedy=f"ask {ROUTES}")
            return RequestOptions(), body | {"model": name} if chosen else body
        given = _at(body, place)
        if not isinstance(given, Mapping):
            return RequestOptions(), body  # vLLM's to refuse
        if chosen and (twice := [key for key in OURS if key in given]):
            raise ConfigError(twice[0], given[twice[0]], f"none: {model} is a choice already", remedy=f"ask for {name}")
        self._check_keys(given, place)
        options = read_options({**given, **chosen}, self.policy)
        if body.get("use_beam_search") and options != RequestOptions():
            allowed = "false with a choice: vLLM's beam search decodes by prompts of its own, which lose it"
            raise ConfigError("use_beam_search", True, allowed, remedy="drop one of them")
        return options, _put(body, place, chosen) | {"model": name} if chosen else body

    def check_adapter(self, adapter: str, names: Sequence[str]) -> None:
        """ConfigError for an alias in SageMaker's header: it replaces the model behind us, without its choice."""
        name, chosen = read_alias(adapter, own_names(names, self.policy))
        if chosen:
            remedy = "write the alias as the model of the body"
            raise ConfigError(ADAPTER, adapter, f"{name}, or an adapter: no alias", remedy=remedy)

    def _alias(self, model: str, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
        name, chosen = read_alias(model, own_names(names, self.policy))
        if chosen and not self.policy.per_request:
            allowed = f"{name}: this server was started with per_request=false and takes no choices from requests"
            raise ConfigError("model", model, allowed, remedy=f"ask for {name}")
        return name, chosen

    def _check_keys(self, given: Mapping[str, Any], place: Place) -> None:
        for key, value in given.items():
            if key in OURS or key in VLLMS or (self.keys_of_others and not _resembles_ours(key)):
                continue
            where = ".".join(place)
            remedy = f"write it right, or drop it from {where}: nothing on this server reads it"
            raise ConfigError(key, value, choices=OURS, remedy=remedy, where=where)


class OptionsMiddleware:
    """Refuses requests whose options cannot be had, and hands vLLM those of the others."""

    def __init__(self, app: ASGIApp, reader: OptionReader, names: Callable[[], Sequence[str]]) -> None:
        self._app, self._reader, self._names = app, reader, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_post(scope):
            return await self._app(scope, receive, send)
        raw: bytes = (await receive())["body"]  # whole: the limit on bodies has read it
        body = await _parse(scope, raw)
        if body is not None:
            try:
                self._reader.check_adapter(Headers(scope=scope).get(ADAPTER, ""), self._names())
                options, wanted = self._reader.read(path_of(scope), body, self._names())
            except ConfigError as wrong:
                refusal = error(scope, HTTPStatus.BAD_REQUEST, str(wrong), wrong.problem.key)
                return await refusal(scope, receive, send)
            scope[NAMED] = bool(body.get("request_id"))
            choose(scope, "dense" if options.dense else "default" if options.budget_tokens is None else "budget")
            if wanted is not body:
                raw = json.dumps(wanted).encode()
                set_header(scope, b"content-length", str(len(raw)).encode())
        await self._app(scope, replay(raw, receive), send)


async def _parse(scope: Scope, raw: bytes) -> Body | None:
    """The body of JSON or of a form; None for what is vLLM's to refuse."""
    if Headers(scope=scope).get("content-type", "").lower().startswith("multipart/form-data"):
        try:
            form = await Request(scope, replay(raw, Request(scope).receive)).form()
        except (HTTPException, MultiPartException):
            return None
        fields = {key: value for key, value in form.items() if isinstance(value, str)}
        return fields | ({"vllm_xargs": _json(fields["vllm_xargs"].encode())} if "vllm_xargs" in fields else {})
    return _json(raw)


def _json(raw: bytes) -> Body | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_misplaced(body: Body, place: Place | None) -> None:
    """ConfigError for keys like ours where nothing reads them."""
    parts = [body, *(body.get(key) for key in ("vllm_xargs", "sampling_params") if (key,) != place)]
    for key, value in chain.from_iterable(part.items() for part in parts if isinstance(part, dict)):
        if not key.startswith("sparse"):
            continue
        if place is None:
            raise ConfigError(key, value, "none: this route has no place for a choice", remedy=f"ask {ROUTES}")
        raise ConfigError(
            key,
            value,
            f"none here: it belongs in {'.'.join(place)}",
            remedy=f"write {json.dumps(_put({}, place, {key: value}))}",
        )


def _resembles_ours(key: str) -> bool:
    return key.lower().startswith("sparse") or bool(difflib.get_close_matches(key.lower(), OURS, cutoff=0.75))


def _at(body: Any, place: Place) -> Any:
    """What stands at `place`; {} where nothing does."""
    for key in place:
        body = (body.get(key) or {}) if isinstance(body, Mapping) else None
    return body


def _put(body: Body, place: Place, added: Mapping[str, Any]) -> Body:
    """A copy of `body` with `added` at `place`."""
    if not place:
        return {**body, **added}
    return body | {place[0]: _put(body.get(place[0]) or {}, place[1:], added)}
