"""A thousand requests of every kind at once: right answers, exact counts, and nothing left behind."""

import math
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sparseserve.server.launch.process import SERVE, Server, running
from sparseserve.testing.waiting import wait_until
from tests.helpers.traffic import MAX_MODEL_LEN, QUESTIONS, WAYS, Run, alone, send, traffic

pytestmark = pytest.mark.e2e
COUNT, SEED = 1000, 0
END_CPU = 3.0  # seconds of all processes; over 6 where each collects its garbage at its end
POLICY = ["--policy", "quest", "--set", "budget_tokens=256", "--set", "min_tokens=128", "--set", "recall_sample=0.05"]
FLAGS = ["--served-model-name", "demo", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16"]  # as `absent`
REQUESTS = traffic(COUNT, SEED)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    command = [*SERVE, str(model), *POLICY, *FLAGS, "--enforce-eager"]
    with running(command, model.parent / "mixed.log", {"VLLM_CPU_KVCACHE_SPACE": "1"}) as started:
        yield started


@pytest.fixture(scope="module")
def alone_texts(server: Server) -> dict[tuple[str, int], str]:
    """What every choice answers to every question when nothing else runs."""
    asked = [alone(choice, question) for choice in WAYS for question in range(len(QUESTIONS))]
    answers = send(server, asked, parallel=1).answers
    return {(answer.request.choice, answer.request.question): answer.texts[0] for answer in answers}


@pytest.fixture(scope="module")
def plain(absent: Server) -> Run:
    """The same traffic without our options, to vLLM alone."""
    send(absent, [alone("default", question) for question in range(len(QUESTIONS))], parallel=1)
    return send(absent, traffic(COUNT, SEED, ours=False))


@pytest.fixture(scope="module")
def run(server: Server, alone_texts: dict[tuple[str, int], str]) -> Run:
    return send(server, REQUESTS)


def counted(server: Server) -> Counter[tuple[str, str]]:
    """sparseserve_requests_total by choice and outcome."""
    pairs = [(choice, outcome) for choice in WAYS for outcome in ("ok", "rejected", "aborted", "failed")]
    name = "sparseserve_requests_total"
    return Counter({pair: int(server.total(name, choice=pair[0], outcome=pair[1])) for pair in pairs})


def test_every_request_ends_as_it_should(run: Run) -> None:
    assert [answer for answer in run.answers if answer.outcome != answer.request.outcome] == []
    assert {request.outcome for request in REQUESTS} == {"ok", "rejected", "aborted"}


def test_answers_are_those_of_the_request_alone(run: Run, alone_texts: dict[tuple[str, int], str]) -> None:
    ended = [answer for answer in run.answers if answer.outcome == "ok"]
    assert all(
        alone_texts[choice, index] == question.answer for index, question in enumerate(QUESTIONS) for choice in WAYS
    )
    for answer in ended:
        assert set(answer.texts) == {alone_texts[answer.request.choice, answer.request.question]}, answer
    assert {len(answer.texts) for answer in ended} == {1, 2}


def test_every_request_gets_its_own_choice(run: Run) -> None:
    told = [(answer.request.choice, answer.sparsity) for answer in run.answers if answer.sparsity is not None]
    assert {(choice, sparsity["dense"], sparsity["budget_tokens"]) for choice, sparsity in told} == {
        ("default", False, 0),
        ("dense", True, 0),
        ("budget", False, 512),
    }
    assert len(told) > 0.98 * sum(answer.outcome == "ok" for answer in run.answers)  # left out where workers are late


def test_every_request_is_counted_once(run: Run, server: Server) -> None:
    sent = Counter((request.choice, request.outcome) for request in REQUESTS)
    sent.update({(choice, "ok"): len(QUESTIONS) for choice in WAYS})  # alone
    # It may see last that a client is gone.
    wait_until(lambda: counted(server) == sent, lambda: f"{counted(server)} is not {sent}", timeout=10)


def test_nothing_is_left_running(run: Run, server: Server) -> None:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    assert {name: server.total(name) for name in names} == dict.fromkeys(names, 0)


@pytest.mark.parametrize("processes", ["worker", "rest"])
def test_memory_grows_no_more_than_without_the_plugin(run: Run, plain: Run, processes: str) -> None:
    (grown, error), (usual, noise) = run.growth(processes), plain.growth(processes)
    print(f"{processes}: {grown:.0f} +- {error:.0f} bytes per request, vLLM alone {usual:.0f} +- {noise:.0f}")
    # A worker's pages become resident when they are first written: two of vLLM alone differ by as much.
    slack = 2**17 if processes == "worker" else 0
    assert grown - usual < 3 * math.hypot(error, noise) + slack


def test_an_idle_server_ends_at_once(server: Server) -> None:
    """Runs last: it ends the server."""
    process = psutil.Process(server.process.pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    before = _cpu_of_children() + sum(
        each.user + each.system + each.children_user + each.children_system for each in times
    )
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    used = _cpu_of_children() - before
    print(f"{used:.1f} s of CPU to end")
    assert used < END_CPU


def _cpu_of_children() -> float:
    """CPU seconds of the processes that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
