"""What stands before vLLM's routes, on one server with a key: options, limits, counts, and at last its end."""

import http.client
import json
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
from openai import APIStatusError, BadRequestError, OpenAI

from sparseserve.server.launch.process import SERVE, Server, running
from sparseserve.testing.waiting import wait_until
from tests.helpers.server.open_paths import OPEN

pytestmark = pytest.mark.e2e
KEY = "sk-test"
FLAGS = ["--policy", "quest", "--set", "budget_tokens=256", "--set", "min_tokens=64", "--set", "recall_sample=1"]
FLAGS += ["--max-request-bytes", "100000"]
VLLM_FLAGS = ["--served-model-name", "demo", "--max-model-len", "4096", "--max-num-seqs", "2", "--enforce-eager"]
LIMITS = ["--max-num-queued-reqs", "4", "--api-key", KEY]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# Registered, but not in the schema or only with other flags.
UNLISTED = ["/inference/v1/generate", "/inference/v1/abort_requests", "/abort_requests", "/collective_rpc", "/sleep"]
LONG: dict[str, Any] = {"model": "demo", "prompt": "a" * 64, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with running([*SERVE, str(model), *FLAGS, *VLLM_FLAGS, *LIMITS], model.parent / "front.log", ENV) as started:
        yield started


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def complete(client: OpenAI, model: str = "demo", **xargs: Any) -> Any:
    extra = {"vllm_xargs": xargs} if xargs else {}
    return client.completions.create(model=model, prompt="a" * 600, max_tokens=3, extra_body=extra)


def call(server: Server, method: str, path: str, body: bytes | None = None, key: str = "") -> tuple[int, Any, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(server.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except HTTPError as error:
        return error.code, error.headers, error.read()


def ran(server: Server) -> float:
    return server.total("vllm:prompt_tokens_total")


def test_models_are_listed_with_their_aliases(client: OpenAI) -> None:
    budgets = [f"demo@budget-{tokens}" for tokens in (128, 256, 512, 1024)]
    assert [model.id for model in client.models.list()] == ["demo", "demo@dense", *budgets]


def test_choices_of_requests_are_taken_and_counted(server: Server, client: OpenAI) -> None:
    def counted(choice: str) -> float:
        return server.total("sparseserve_requests_total", choice=choice, outcome="ok")

    before = {choice: counted(choice) for choice in ("default", "dense", "budget")}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("demo", {}),
        ("demo@default", {}),
        ("demo", {"sparse_policy": "dense"}),
        ("demo@dense", {}),
        ("demo", {"sparse_budget_tokens": 512}),
        ("demo@budget-128", {}),
    ]
    answers = [complete(client, name, **xargs) for name, xargs in asked]
    assert {answer.usage.completion_tokens for answer in answers} == {3}
    outcomes = [answer.usage.sparsity for answer in answers]
    assert [outcome["dense"] for outcome in outcomes] == [False, False, True, True, False, False]
    assert [outcome["budget_tokens"] for outcome in outcomes] == [0, 0, 0, 0, 512, 128]
    default, _, _, _, large, small = (outcome["recall"] for outcome in outcomes)
    assert 0 < small < default < large < 1
    chat = client.chat.completions.create(
        model="demo@dense", messages=[{"role": "user", "content": "x"}], max_tokens=2, stream=True
    )
    assert len(list(chat)) > 1
    assert {choice: counted(choice) - value for choice, value in before.items()} == {
        "default": 2,
        "dense": 3,
        "budget": 2,
    }
    assert server.total("sparseserve_configured", policy="quest") == 1


def test_refused_choices_tell_a_stock_client_why(server: Server, client: OpenAI) -> None:
    tokens = ran(server)
    with pytest.raises(BadRequestError, match="sparse_polcy = dense.*Did you mean 'sparse_policy'"):
        complete(client, sparse_polcy="dense")
    with pytest.raises(BadRequestError, match="demo@densee is refused.*Did you mean 'demo@dense'"):
        complete(client, "demo@densee")
    with pytest.raises(BadRequestError, match="sparse_budget_tokens = 4096 is refused.*to 1024"):
        complete(client, sparse_budget_tokens=4096)
    with pytest.raises(BadRequestError, match="belongs in vllm_xargs"):
        client.completions.create(model="demo", prompt="x", extra_body={"sparse_policy": "dense"})
    assert ran(server) == tokens


def test_large_bodies_are_refused(server: Server) -> None:
    tokens = ran(server)
    body = json.dumps({"model": "demo", "prompt": "a" * 100_000}).encode()
    status, _, answer = call(server, "POST", "/v1/completions", body, KEY)
    assert status == 413 and "--max-request-bytes" in json.loads(answer)["error"]["message"]
    assert ran(server) == tokens


def test_no_route_runs_or_changes_anything_without_the_key(server: Server) -> None:
    schema = json.loads(call(server, "GET", "/openapi.json", key=KEY)[2])
    listed = [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]
    assert {("POST", "/invocations"), ("POST", "/tokenize"), ("POST", "/scale_elastic_ep")} <= set(listed)
    body = json.dumps({"model": "demo", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}).encode()
    tokens = ran(server)
    for method, path in [*listed, *(("POST", path) for path in UNLISTED), ("GET", "/openapi.json"), ("GET", "/docs")]:
        for key in ("", "sk-wrong"):
            status, _, answer = call(server, method, path, body if method == "POST" else None, key)
            if method == "GET" and path in OPEN:
                assert status in (200, 404)  # the page is off
            else:
                assert (status, json.loads(answer)) == (401, {"error": "Unauthorized"}), (method, path)
    assert ran(server) == tokens
    assert call(server, "POST", "/invocations", body, KEY)[0] == 200
    assert ran(server) > tokens


def test_a_full_queue_is_told_with_a_time_to_come_back(client: OpenAI) -> None:
    def ask(_: int) -> APIStatusError | None:
        try:
            client.completions.create(**LONG | {"max_tokens": 1000})
        except APIStatusError as error:
            return error
        return None

    with ThreadPoolExecutor(12) as pool:
        refused = [error for error in pool.map(ask, range(12)) if error is not None]
    assert 0 < len(refused) < 12
    assert {(error.status_code, error.response.headers["retry-after"]) for error in refused} == {(503, "1")}


def test_clients_that_go_away_are_counted(server: Server, client: OpenAI) -> None:
    before = server.total("sparseserve_requests_total", outcome="aborted")
    stream = client.completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.total("sparseserve_requests_total", outcome="aborted") == before + 1)
    wait_until(lambda: server.total("vllm:num_requests_running") == 0)


def test_a_stopped_server_finishes_what_runs(server: Server, client: OpenAI) -> None:
    """Runs last: it ends the server."""
    assert call(server, "GET", "/ready")[0] == 200
    body = json.dumps({"model": "demo", "prompt": "a", "max_tokens": 3, "ignore_eos": True}).encode()
    unsent = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    unsent.putrequest("POST", "/v1/completions")
    unsent.putheader("Authorization", f"Bearer {KEY}")
    unsent.putheader("Content-Type", "application/json")
    unsent.putheader("Content-Length", str(len(body)))
    unsent.endheaders(body[:-1])  # runs until the last byte is there
    stream = client.completions.create(
        **LONG | {"max_tokens": 300}, stream=True, stream_options={"include_usage": True}
    )
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: call(server, "GET", "/ready")[0] != 200)
    status, headers, answer = call(server, "GET", "/ready")
    assert (status, json.loads(answer), headers["Retry-After"]) == (503, {"status": "draining"}, "1")
    assert server.total("sparseserve_draining") == 1
    with pytest.raises(APIStatusError, match="takes no new requests") as refused:
        complete(client)
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")
    chunks += stream
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 300
    assert chunks[-2].choices[0].finish_reason == "length"
    unsent.send(body[-1:])
    assert json.load(unsent.getresponse())["usage"]["completion_tokens"] == 3
    assert server.process.wait(30) == 0
    log = server.log.read_text()
    assert "Exception in ASGI application" not in log and "cannot schedule new futures" not in log
