"""Real servers over HTTP: the same answers as vLLM alone, true metrics, the right exit code."""

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError

import pytest
from openai import OpenAI

from sparseserve.questions.needles import Question, ask
from sparseserve.server.launch.process import Server
from sparseserve.testing.waiting import wait_until

pytestmark = pytest.mark.e2e

LONG = [ask(tokens, depth, seed=1) for tokens, depth in [(8192, 0.1), (8192, 0.5), (5000, 0.9), (2500, 0.3)]]
SHORT = [ask(tokens, 0.5, seed=2, distractors=0) for tokens in (150, 300, 700)]
RAGGED = [ask(tokens, 0.2, seed=3, distractors=0) for tokens in (100, 400, 900, 1500, 2600, 4000, 6000, 8000)]
BAD_REQUESTS: list[dict[str, Any]] = [
    {"prompt": "x", "max_tokens": 100_000},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x" * 20_000},
    {"model": "no-such-model", "prompt": "x"},
    {"prompt": None},
    {"prompt": "x", "n": 0},
]


def complete(server: Server, question: Question, **extra: Any) -> Any:
    body = {"model": "demo", "prompt": question.prompt, "temperature": 0, "max_tokens": 16} | extra
    return post(server, body)[1]


def post(server: Server, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def text(response: Any) -> str:
    answer: str = response["choices"][0]["text"]
    return answer


def busy(server: Server) -> bool:
    """Whether requests run or KV pages are in use."""
    return bool(server.total("vllm:num_requests_running") or server.total("vllm:kv_cache_usage_perc"))


@pytest.mark.parametrize("question", LONG, ids=lambda question: f"{question.tokens}-{question.value_start}")
def test_dense_gives_the_tokens_of_vllm_alone(absent: Server, dense: Server, question: Question) -> None:
    assert text(complete(dense, question)) == text(complete(absent, question)) == question.answer


def test_short_requests_are_bit_identical_to_vllm_alone(absent: Server, quest: Server) -> None:
    for question in SHORT:
        theirs, ours = (complete(server, question, logprobs=5)["choices"] for server in (absent, quest))
        assert ours == theirs  # log-probabilities to the last digit


def test_bad_requests_fail_as_in_vllm_alone(absent: Server, dense: Server) -> None:
    for bad in BAD_REQUESTS:
        theirs, ours = (post(server, {"model": "demo"} | bad) for server in (absent, dense))
        assert ours == theirs
        assert ours[0] in (400, 404)


def test_the_openai_client_streams_a_chat(tidal: Server) -> None:
    client = OpenAI(base_url=f"{tidal.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": LONG[0].prompt}], max_tokens=16, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == LONG[0].answer
    assert sum(map(bool, pieces)) > 5  # token by token


@pytest.mark.parametrize("name", ["quest", "tidal"])
def test_ragged_batches_with_cancelled_requests(request: pytest.FixtureRequest, name: str) -> None:
    """Eight requests at once, and three that go away, answer as each does alone; nothing is left behind."""
    server: Server = request.getfixturevalue(name)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def cancel(question: Question) -> None:
        stream = client.completions.create(
            model="demo", prompt=question.prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(11) as pool:
        cancelled = [pool.submit(cancel, question) for question in LONG[:3]]
        together = [text(answer) for answer in pool.map(lambda question: complete(server, question), RAGGED)]
        for future in cancelled:
            future.result()
    alone = [text(complete(server, question)) for question in RAGGED]
    assert together == alone == [question.answer for question in RAGGED]
    wait_until(lambda: not busy(server), lambda: "requests or KV pages are left over", timeout=20)


def test_a_prefix_hit_answers_as_a_miss(quest: Server) -> None:
    question = ask(6000, 0.4, seed=9)
    hits = quest.total("vllm:prefix_cache_hits_total")
    miss = text(complete(quest, question))
    hit = text(complete(quest, question))
    assert quest.total("vllm:prefix_cache_hits_total") - hits > 5000
    assert hit == miss == question.answer


@pytest.mark.parametrize(("name", "least", "most"), [("quest", 0.30, 0.55), ("tidal", 0.65, 0.80), ("dense", 1.0, 1.0)])
def test_metrics_count_what_the_kernels_read(
    request: pytest.FixtureRequest, name: str, least: float, most: float
) -> None:
    server: Server = request.getfixturevalue(name)
    before = {metric: server.total(f"sparseserve_{metric}_total") for metric in ("decode_rows", "dense_rows")}
    attended, resident = (server.total(f"sparseserve_kv_tokens_{kind}_total") for kind in ("attended", "resident"))
    question = ask(8192, 0.5, seed=11)
    answer = complete(server, question)
    rows = answer["usage"]["completion_tokens"] - 1  # the first token is the prefill's
    assert server.total("sparseserve_decode_rows_total") - before["decode_rows"] == rows
    assert server.total("sparseserve_dense_rows_total", reason="prefill") > 0
    attended = server.total("sparseserve_kv_tokens_attended_total") - attended
    resident = server.total("sparseserve_kv_tokens_resident_total") - resident
    assert resident == 6 * sum(question.tokens + step for step in range(1, rows + 1))  # six layers
    assert least <= attended / resident <= most
    assert server.total("sparseserve_info", policy=name) == 1
    full, summaries, dense = (
        server.total("sparseserve_kv_bytes", kind=kind) for kind in ("full", "summaries", "dense_equivalent")
    )
    assert 0 < full == dense and bool(summaries) == (name == "quest")
    assert (server.total("sparseserve_kv_capacity_gain") < 1) == (name == "quest")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
@pytest.mark.parametrize("name", ["quest", "tidal"])
def test_promtool_has_nothing_to_say(request: pytest.FixtureRequest, name: str) -> None:
    lines = request.getfixturevalue(name).get("/metrics").splitlines()
    ours = "".join(f"{line}\n" for line in lines if "sparseserve_" in line)
    check = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, text=True)
    assert ours and (check.returncode, check.stdout + check.stderr) == (0, "")


def test_a_stop_is_a_success_and_a_dead_engine_is_not(dense: Server, quest: Server) -> None:
    """Runs last: it ends two of the servers."""
    assert dense.stop() == 0
    os.kill(_worker(quest), signal.SIGKILL)
    assert quest.process.wait(60) != 0


def _worker(server: Server) -> int:
    """The process group's fattest process holds the model."""
    group = subprocess.run(["ps", "-eo", "pid,ppid,rss,args", "--no-headers"], capture_output=True, text=True)
    tree, found = {server.process.pid}, []
    for line in sorted(group.stdout.splitlines(), key=lambda line: int(line.split()[0])):
        pid, parent, rss, args = line.split(None, 3)
        if int(parent) in tree:
            tree.add(int(pid))
            found.append((int(rss), int(pid)))
    return max(found)[1]
