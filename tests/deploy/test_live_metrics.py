"""A real Prometheus over a real server under load: every panel and rule has data, and the right alerts stay silent."""

import re
import shutil
from collections.abc import Iterator
from itertools import chain

import pytest
from openai import BadRequestError, OpenAI

from sparseserve.demo.build import build
from sparseserve.questions.needles import ask
from sparseserve.server.launch.process import SERVE, Server, running
from tests.helpers.deploy.observability import DASHBOARDS, RECORDED, RULES, expressions, names, selectors
from tests.helpers.deploy.prometheus import Prometheus, scraping

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus (Debian package of that name) is not installed"
    ),
]

# A budget that cannot keep the floor, so that the guard has something to do.
POLICY = {
    "min_tokens": 512,
    "budget_tokens": 256,
    "max_budget_tokens": 512,
    "recall_sample": 1,
    "recall_floor": 0.99,
    "recall_action": "widen",
}
FLAGS = ["--served-model-name", "demo", "--max-model-len", "4096", "--max-num-seqs", "4", "--enforce-eager"]
FLAGS += ["--max-num-queued-reqs", "16"]
# Series that a server with this policy cannot have; rules_test.yml has them.
ABSENT = {'sparseserve_under_floor_total{expects="sparseserve", action="report"}'}
SILENT = {"sparseserve-policy", "sparseserve-server"}  # groups of alerts that a healthy server must not raise


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    build(folder / "demo")
    settings = [part for key, value in POLICY.items() for part in ("--set", f"{key}={value}")]
    command = [*SERVE, str(folder / "demo"), "--policy", "quest", *settings, *FLAGS]
    with running(command, folder / "server.log", {"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(served: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After the same load twice: a rate needs two values."""
    with scraping(served.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")) as prometheus:
        prometheus.wait_for("sparseserve_configured")
        for rounds in (1, 2):
            load(served, seed=rounds)
            prometheus.wait_for(f'sum(sparseserve_requests_total{{outcome="aborted"}}) >= {rounds}')
            prometheus.wait_for("sum(vllm:num_requests_running) == 0")
        for name in RECORDED:
            prometheus.wait_for(name)
        yield prometheus


def load(server: Server, seed: int) -> None:
    """Requests of every choice and every outcome but a failure."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def complete(tokens: int, model: str = "demo", **options: object) -> None:
        prompt = ask(tokens, 0.5, seed, distractors=0).prompt
        client.completions.create(
            model=model, prompt=prompt, max_tokens=24, extra_body={"ignore_eos": True, "vllm_xargs": options}
        )

    complete(200)
    complete(1500)
    complete(1500)
    complete(1500, model="demo@dense")
    complete(1500, sparse_budget_tokens=384)
    with pytest.raises(BadRequestError):
        complete(200, sparse_budget_tokens=1)
    stream = client.completions.create(
        model="demo", prompt="x" * 600, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()


@pytest.fixture(scope="module")
def choices(prometheus: Prometheus) -> dict[str, str]:
    """Every variable of the dashboards: all that its own query finds, or the value that a dashboard begins with."""
    found = {"__rate_interval": "5m", "__range": "5m"}
    for variable in chain.from_iterable(dashboard["templating"]["list"][1:] for dashboard in DASHBOARDS.values()):
        query = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert query is not None
        values = prometheus.api(f"label/{query[2]}/values", **{"match[]": fill(query[1], found)})
        first = variable["current"]["value"]
        assert values if first == "$__all" else first in values, variable["name"]
        found[variable["name"]] = "|".join(values) if first == "$__all" else first
    return found


def fill(text: str, choices: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: choices[match[1]], text)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_has_data(prometheus: Prometheus, choices: dict[str, str], name: str) -> None:
    wanted = [fill(expression, choices) for expression in expressions(DASHBOARDS[name])]
    assert not [expression for expression in wanted if not prometheus.values(expression)]


def test_panels_and_rules_name_metrics_that_exist(prometheus: Prometheus) -> None:
    asked = [expression for dashboard in DASHBOARDS.values() for expression in expressions(dashboard)]
    asked += [rule["expr"] for rule in RULES]
    assert set.union(*map(names, asked)) <= set(prometheus.api("label/__name__/values"))


def test_every_rule_finds_its_series(prometheus: Prometheus) -> None:
    wanted = {selector for rule in RULES for selector in selectors(rule["expr"])} | set(RECORDED)
    assert {selector for selector in wanted if not prometheus.values(selector)} == ABSENT


def test_rules_evaluate_and_the_right_alerts_are_silent(prometheus: Prometheus) -> None:
    groups = {group["name"]: group["rules"] for group in prometheus.api("rules")["groups"]}
    assert {rule.get("lastError", "") for rules in groups.values() for rule in rules} == {""}
    prometheus.wait_for("up == 1")
    for rule in chain.from_iterable(groups[name] for name in SILENT):
        assert not prometheus.values(rule["query"]), rule["name"]
    for name in ("SparseserveRecallUnderFloor", "SparseserveRecallTailUnderFloor"):
        prometheus.wait_for(f'ALERTS{{alertname="{name}", alertstate="pending"}}')
