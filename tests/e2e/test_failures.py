"""What happens when files break, workers stop or die, and queues fill: RUNBOOK.md's table, on one server."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sparseserve.demo.gates import build_gates
from sparseserve.questions.needles import ask
from sparseserve.server.launch.process import SERVE, STARTUP_TIMEOUT, Server, running
from sparseserve.server.launch.supervise import START_GRACE
from sparseserve.testing.waiting import wait_until

pytestmark = pytest.mark.e2e
ROWS, TAKEN = 2, 4  # vLLM's cap on the queue counts the rows that run, too
FLAGS = ["--served-model-name", "demo", "--max-model-len", "9216", "--max-num-seqs", str(ROWS), "--enforce-eager"]
FLAGS += ["--max-num-queued-reqs", str(TAKEN)]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}
QUESTION = ask(700, 0.5, seed=3, value_length=4)
BODY = {"prompt": QUESTION.prompt, "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failures") / "gates.safetensors"
    build_gates(path)
    return path


@pytest.fixture(scope="module")
def policy(gates: Path) -> Path:
    path = gates.with_name("policy.yaml")
    _write(path, gates, "budget_tokens")
    return path


@pytest.fixture(scope="module")
def server(model: Path, policy: Path) -> Iterator[Server]:
    with running(_command(model, policy), policy.with_name("server.log"), ENV) as started:
        yield started


def _write(policy: Path, gates: Path, key: str) -> None:
    policy.write_text(f'models: {{"*": {{policy: seer, artifact: {gates}, min_tokens: 128, {key}: 256}}}}')


def _command(model: Path, policy: Path) -> list[str]:
    return [*SERVE, str(model), "--policy", str(policy), *FLAGS]


def _refused(model: Path, policy: Path) -> str:
    """What a start that ends with exit code 2 says."""
    ended = subprocess.run(_command(model, policy), env=os.environ | ENV, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


def _post(server: Server) -> httpx.Response:
    # A client of its own: threads that share one may wait for each other's connection.
    return httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=120, verify=False)


def _text(response: httpx.Response) -> str:
    text: str = response.json()["choices"][0]["text"]
    return text


def _events(server: Server, tokens: int) -> list[dict[str, Any]]:
    """The events of a stream, to its end or to where it breaks off; of one that never began its refusal."""
    events: list[dict[str, Any]] = []
    body = BODY | {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120, verify=False) as response:
        if response.is_error:
            return [json.loads(response.read())]
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    return events


def _streams(pool: ThreadPoolExecutor, server: Server, tokens: int) -> list[Future[list[dict[str, Any]]]]:
    """As many streams as the server takes: some run, the others wait."""
    streams = [pool.submit(_events, server, tokens) for _ in range(TAKEN)]
    wait_until(lambda: server.total("vllm:num_requests_waiting") == TAKEN - ROWS)
    return streams


@contextmanager
def _standing_still(server: Server) -> Iterator[None]:
    worker = _worker(server)
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


def _worker(server: Server) -> psutil.Process:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return next(process for process in processes if process.name().startswith("VLLM::Worker"))


def test_a_stop_while_the_server_starts_is_not_swallowed(model: Path, policy: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = psutil.Popen(_command(model, policy), stdout=output, stderr=output, env=os.environ | ENV)

    def engine_starts() -> bool:
        assert server.poll() is None
        return "EngineCore" in log.read_text()

    wait_until(engine_starts, log.read_text, timeout=STARTUP_TIMEOUT)
    started = server.children(recursive=True)
    server.terminate()
    assert server.wait(START_GRACE + 10) == 0
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_a_policy_file_that_breaks_stops_the_next_start_only(
    model: Path, policy: Path, gates: Path, server: Server
) -> None:
    _write(policy, gates, "budget_tokns")
    said = _refused(model, policy)
    assert all(part in said for part in (str(policy), "budget_tokns = 256", "Did you mean 'budget_tokens'", "Remedy"))
    assert _text(_post(server)) == QUESTION.answer
    _write(policy, gates, "budget_tokens")


def test_an_artifact_that_breaks_stops_the_next_start_only(
    model: Path, policy: Path, gates: Path, server: Server
) -> None:
    whole = gates.read_bytes()
    gates.write_bytes(whole[:-1])
    said = _refused(model, policy)
    assert all(part in said for part in (str(gates), "Remedy")), said
    assert _text(_post(server)) == QUESTION.answer
    gates.write_bytes(whole)


def test_a_worker_that_stands_still_delays_answers(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        streams = _streams(pool, server, tokens=1000)
        with _standing_still(server):
            assert not wait(streams, timeout=3).done
        events = [stream.result() for stream in streams]
    assert {stream[-1]["choices"][0]["finish_reason"] for stream in events} == {"length"}
    assert len({"".join(event["choices"][0]["text"] for event in stream) for stream in events}) == 1


def test_a_full_queue_sends_clients_away_and_works_on(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        with _standing_still(server):
            answers = [pool.submit(_post, server) for _ in range(TAKEN + 2)]
            refused = [answer.result() for answer in islice(as_completed(answers, timeout=60), 2)]
            assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
        taken = [answer.result() for answer in answers if answer.result() not in refused]
        assert [_text(answer) for answer in taken] == [QUESTION.answer] * TAKEN


def test_a_killed_worker_ends_every_stream_and_the_server(server: Server) -> None:
    """Runs last: it ends the server."""
    with ThreadPoolExecutor() as pool:
        streams = _streams(pool, server, tokens=8000)
        _worker(server).kill()
        deadline = time.monotonic() + 10
        events = [stream.result(deadline - time.monotonic()) for stream in streams]
    assert all("error" in stream[-1] for stream in events)
    assert server.process.wait(30) == 1
    assert "the server ended without being told to" in server.log.read_text()
