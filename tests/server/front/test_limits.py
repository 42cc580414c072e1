"""Keys and the size of bodies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.tasks import SupportedTask

from sparseserve.errors import ConfigError
from tests.helpers.server.open_paths import OPEN
from tests.helpers.server.served_app import Workers, busy_worker, configured, served

pytestmark = pytest.mark.vllm
KEY = {"Authorization": "Bearer sk-right"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def test_everything_but_the_open_paths_needs_the_key(front: Any) -> None:
    server = front(api_key=["sk-right"])
    routes = [(method, route.path) for route in server.app.routes for method in route.methods or ()]
    assert len(routes) > 20
    for method, path in [*routes, ("POST", "/health"), ("GET", "/no-such-path"), ("DELETE", "/health")]:
        is_open = method == "GET" and path in OPEN
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "sk-right"}):
            answer = server.client.request(method, path, headers=headers)
            assert (answer.status_code == 401) == (not is_open), (method, path)
            assert is_open or method == "HEAD" or answer.json() == {"error": "Unauthorized"}
        assert server.client.request(method, path, headers=KEY).status_code != 401
    assert len(server.bodies) == sum(method == "POST" for method, _ in routes)  # those with the key


@pytest.fixture(scope="module")
def all_routes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """vLLM's app and ours with a key, every task and the routes of developers."""
    args, config = configured(tmp_path_factory.mktemp("model"), "--api-key", "sk-right")
    engine = Workers(config, lambda: [busy_worker()])
    plugins = ("sparseserve_front", "sparseserve_metrics", "sparseserve_routes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with served(args, engine, page="1", plugins=plugins, tasks=get_args(SupportedTask)) as app:
            yield TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-wrong"}], ids=["no key", "wrong key"])
def test_every_route_of_vllm_and_of_ours_needs_the_key_but_the_open_ones(
    all_routes: TestClient, headers: dict[str, str]
) -> None:
    found = set()
    app: Any = all_routes.app  # vLLM's, which the client knows as a callable alone
    for route in app.routes:
        path = re.sub(r"\{\w+\}", "x", route.path)
        if isinstance(route, WebSocketRoute):
            with pytest.raises(WebSocketDenialResponse) as denied, all_routes.websocket_connect(path, headers=headers):
                pass
            assert denied.value.status_code == 401, path
            continue
        found.add(path := path + "/x" if isinstance(route, Mount) else path)
        for method in METHODS:
            is_open = method == "GET" and path in OPEN
            status = all_routes.request(method, path, headers=headers).status_code
            assert (status == 401) == (not is_open), (method, path, status)
    assert {"/v1/chat/completions", "/v1/embeddings", "/collective_rpc", "/v1/sparsity", "/metrics/x"} < found > OPEN


def test_the_key_may_be_in_the_environment(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-right")
    server = front()
    assert server.post("/invocations", {}).status_code == 401
    assert server.post("/invocations", {}, headers=KEY).status_code == 200


def test_without_a_key_all_is_open(front: Any) -> None:
    assert front().post("/invocations", {}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused(front: Any, monkeypatch: pytest.MonkeyPatch, path: str, chunked: bool) -> None:
    monkeypatch.setenv("SPARSESERVE_MAX_REQUEST_BYTES", "1000")
    server = front()
    read = []

    def pieces(size: int) -> Iterator[bytes]:
        for _ in range(size // 100):
            read.append(100)
            yield b"x" * 100

    fits, large = (pieces(size) if chunked else b"x" * size for size in (1000, 1100))
    assert server.client.post(path, content=fits).status_code == 200
    assert server.bodies == [b"x" * 1000]
    answer = server.client.post(path, content=large)
    assert answer.status_code == 413 and len(server.bodies) == 1
    error = ErrorResponse.model_validate(answer.json()).error
    assert error.code == 413 and "1000 bytes" in error.message and "--max-request-bytes" in error.message


@pytest.mark.parametrize("value", ["0", "-1", "32M"])
def test_a_cap_that_is_no_number_of_bytes_is_refused(front: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SPARSESERVE_MAX_REQUEST_BYTES", value)
    with pytest.raises(ConfigError, match=f"SPARSESERVE_MAX_REQUEST_BYTES = {value} .*whole number"):
        front()


def test_no_cap_is_32_mib(front: Any) -> None:
    server = front()
    assert server.client.post("/tokenize", content=b"x" * 2**25).status_code == 200
    assert server.client.post("/tokenize", content=b"x" * (2**25 + 1)).status_code == 413
