"""The stack of deploy/compose.yaml, run as processes: server, nginx and Prometheus from the files that it mounts."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from sparseserve.demo.build import build
from sparseserve.questions.needles import ask
from sparseserve.server.launch.process import SERVE, Server, running
from tests.helpers.deploy.compose import SERVICES
from tests.helpers.deploy.observability import ALERTS
from tests.helpers.deploy.prometheus import INTERVAL, Prometheus
from tests.helpers.deploy.stack import KEY, SBIN, command, environment, free_address, process, without_compiler
from tests.helpers.paths import DEPLOY

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and (shutil.which("nginx") or shutil.which("nginx", path=SBIN))),
        reason="prometheus and nginx (Debian packages prometheus, nginx-light) are not installed",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    build(folder / "demo")
    started = [*SERVE, *command("sparseserve", folder, {"/models/demo": str(folder / "demo")})]
    env = environment("sparseserve") | {"PATH": without_compiler(folder / "bin")}
    with running(started, folder / "server.log", env) as server:
        yield server


@pytest.fixture(scope="module")
def nginx(folder: Path, server: Server) -> Iterator[str]:
    address = free_address()
    places = {
        "sparseserve:8000": server.url.removeprefix("http://"),
        "listen 8080": f"listen {address}",
        "daemon off;": "daemon off; user root;",  # who may write to the folder
        "/tmp/": f"{folder}/",
    }
    with process(command("nginx", folder / "nginx", places), f"http://{address}/health", folder / "nginx.log"):
        yield address


@pytest.fixture(scope="module")
def prometheus(folder: Path, server: Server) -> Iterator[Prometheus]:
    address = free_address()
    places = {
        "sparseserve:8000": server.url.removeprefix("http://"),
        "_interval: 15s": f"_interval: {INTERVAL}",
        "path=/prometheus": f"path={folder}/series",
    }
    started = [*command("prometheus", folder / "prometheus", places), f"--web.listen-address={address}"]
    with process(["prometheus", *started], f"http://{address}/-/ready", folder / "prometheus.log"):
        yield Prometheus(f"http://{address}")


@pytest.fixture(scope="module")
def client(nginx: str) -> OpenAI:
    return OpenAI(base_url=f"http://{nginx}/v1", api_key=KEY, max_retries=0)


def status(address: str, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, headers=headers)
    return connection.getresponse().status


def healthy(server: Server) -> bool:
    """What the image's own check says."""
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", (DEPLOY / "Dockerfile.cpu").read_text(), re.MULTILINE)
    assert found is not None
    _, *arguments = json.loads(found[1].replace("http://127.0.0.1:8000", server.url))
    return subprocess.run([sys.executable, *arguments], stderr=subprocess.DEVNULL).returncode == 0


def test_a_question_through_nginx_is_answered(client: OpenAI) -> None:
    question = ask(4096, 0.5, seed=0)
    answer = client.completions.create(model="demo", prompt=question.prompt, max_tokens=16, temperature=0)
    assert answer.choices[0].text == question.answer


def test_streams_come_through_nginx_in_pieces(client: OpenAI, server: Server) -> None:
    stream = client.completions.create(
        model="demo", prompt="x" * 64, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.total("vllm:num_requests_running") == 1  # and not all of it at the end
    assert len(list(islice(stream, 100))) == 100
    stream.close()


def test_nginx_lets_through_what_it_should(nginx: str, client: OpenAI) -> None:
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    key = {"Authorization": f"Bearer {KEY}"}
    assert status(nginx, "GET", "/v1/models", **key) == status(nginx, "GET", "/metrics") == 200
    assert status(nginx, "POST", "/health", **key) == 403
    assert {status(nginx, "GET", path, **key) for path in ("/docs", "/openapi.json", "/invocations")} == {404}
    large = key | {"Content-Length": str(2**25 + 1)}
    assert status(nginx, "POST", "/v1/completions", **large) == 413


def test_prometheus_sees_a_server_that_raises_no_alert(prometheus: Prometheus) -> None:
    prometheus.wait_for('up{job="sparseserve"} == 1')
    prometheus.wait_for('sparseserve_info{policy="quest"}')
    rules = [*chain.from_iterable(group["rules"] for group in prometheus.api("rules")["groups"])]
    alerts = {rule["name"]: rule["query"] for rule in rules if rule["type"] == "alerting"}
    assert set(alerts) == set(ALERTS) and {rule.get("lastError", "") for rule in rules} == {""}
    assert [name for name, query in alerts.items() if prometheus.values(query)] == []


def test_a_stopped_server_ends_in_time_and_says_so(server: Server, nginx: str) -> None:
    """Runs last: it ends the server."""
    assert healthy(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(int(SERVICES["sparseserve"]["stop_grace_period"].removesuffix("s"))) == 0
    assert not healthy(server)
    assert status(nginx, "GET", "/health") == 502
