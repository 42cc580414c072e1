"""deploy/nginx.conf, run by nginx itself in front of a stand-in for the server."""

from __future__ import annotations

import getpass
import http.client
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sparseserve.server.launch.process import free_port
from sparseserve.testing.waiting import PATIENCE
from tests.helpers.deploy.stack import process
from tests.helpers.paths import DEPLOY

CONFIG = DEPLOY / "nginx.conf"
STREAM = "/v1/completions"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx (Debian package nginx-light) is not installed")


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers anything in two chunks, the second of a stream when the client has the first."""

    protocol_version = "HTTP/1.1"
    arrived = threading.Event()
    seen: list[tuple[str, str, str | None]] = []

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.path, self.headers.get("X-Request-Id")))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        self.wfile.flush()
        if self.path == STREAM:
            self.arrived.wait(2 * PATIENCE)
        self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")

    do_POST = do_DELETE = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder, listen = tmp_path_factory.mktemp("nginx"), free_port()
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    text = CONFIG.read_text().replace("/tmp/nginx", f"{folder}/nginx")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{listen}")
    text = text.replace("server 127.0.0.1:8000", f"server 127.0.0.1:{upstream.server_address[1]}")
    (folder / "nginx.conf").write_text(text)
    more = f"daemon off; user {getpass.getuser()};"  # who may write to the folder
    command = [str(NGINX), "-c", str(folder / "nginx.conf"), "-p", str(folder), "-g", more]
    with process(command, f"http://127.0.0.1:{listen}/health", folder / "nginx.log"):
        yield listen
    upstream.shutdown()


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    response.read()
    return response.status


def test_the_file_as_it_is_is_valid() -> None:
    check = subprocess.run([str(NGINX), "-t", "-c", str(CONFIG)], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_nginx_makes_folders_in_tmp_alone() -> None:
    """Whoever compiled it: what this nginx would make elsewhere at start is somewhere else in a container."""
    options = subprocess.run([str(NGINX), "-V"], capture_output=True, text=True).stderr
    kinds = [kind.replace("-", "_") for kind in re.findall(r"--http-(\S+)-temp-path", options)]
    set_here = dict(re.findall(r"(\w+)_temp_path (\S+);", CONFIG.read_text()))
    assert len(kinds) == 5 and set(kinds) == set(set_here)
    assert all(path.startswith("/tmp/") for path in set_here.values())


@pytest.mark.vllm
def test_nginx_closes_idle_connections_before_the_server_does() -> None:
    from vllm import envs

    (idle,) = re.findall(r"^\s+keepalive_timeout (\d+)s;", CONFIG.read_text(), re.MULTILINE)
    assert int(idle) < envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_1-a"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/sparsity"),
        ("GET", "/sparsity"),
        ("GET", "/health"),
        ("GET", "/ready?x=1"),
        ("GET", "/metrics"),
    ],
)
def test_what_clients_need_passes(port: int, method: str, path: str) -> None:
    assert ask(port, method, path, b"", **{"X-Request-Id": "claimed"}) == 200
    *seen, request_id = Upstream.seen[-1]
    assert seen == [method, path]
    assert re.fullmatch("[0-9a-f]{32}", request_id or "")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("POST", "/scale_elastic_ep"),
        ("POST", "/collective_rpc"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/inference/v1/generate"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/completions/../../docs"),
        ("POST", "//invocations"),
        ("POST", "/v1/responses/..%2f..%2finvocations"),
        ("POST", "/v1/completions/render"),
        ("POST", "/health"),
        ("DELETE", "/metrics"),
        ("POST", "/v1/models"),
    ],
)
def test_nothing_else_passes(port: int, method: str, path: str) -> None:
    before = len(Upstream.seen)
    assert ask(port, method, path) in (403, 404)
    assert len(Upstream.seen) == before


def test_large_bodies_do_not_reach_the_server(port: int) -> None:
    before = len(Upstream.seen)
    assert ask(port, "POST", "/v1/chat/completions", b"x" * 2**25) == 200
    assert ask(port, "POST", "/v1/chat/completions", b"", **{"Content-Length": str(2**25 + 1)}) == 413
    assert len(Upstream.seen) == before + 1


def test_streams_are_not_held_back(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", STREAM, b"{}")
    response = connection.getresponse()
    assert response.read(5) == b"first"
    Upstream.arrived.set()
    assert response.read() == b"last"
