"""/v1/sparsity in vLLM's own app: what it says of a policy, of its plan and of what the workers counted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.testclient import TestClient

from sparseserve.config import find_policy, to_dict
from sparseserve.policies import Quest
from sparseserve.server.views.live import live
from sparseserve.server.views.metrics import WorkerMetrics
from sparseserve.server.views.policy import active_policy
from sparseserve.testing.plans import write_head_map
from tests.helpers.server.served_app import KV_HEADS, LAYERS, LONGEST, Workers, busy_worker, configured, served

pytestmark = pytest.mark.vllm
PATHS = ("/v1/sparsity", "/v1/sparsity/plan", "/v1/sparsity/live")
WATCHED = ("recall_sample=0.01", "recall_floor=0.9", "recall_action=widen")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    args, config = configured(tmp_path_factory.mktemp("model"), sets=WATCHED)
    with served(args, Workers(config, lambda: [busy_worker(), busy_worker()])) as app:
        yield TestClient(app)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What /plan says, of a server with a policy and flags, at a length."""

    def ask(policy: str, *sets: str, flags: tuple[str, ...] = (), length: int = LONGEST) -> Any:
        args, config = configured(tmp_path_factory.mktemp("model"), *flags, policy=policy, sets=sets)
        with served(args, Workers(config, list)) as app:
            return TestClient(app).get(f"/v1/sparsity/plan?length={length}").json()

    return ask


def test_the_policy_is_told_with_what_requests_may_ask(client: TestClient) -> None:
    told = client.get("/v1/sparsity").json()
    policy = Quest(recall_sample=0.01, recall_floor=0.9, recall_action="widen")
    assert (told["model"], told["policy"], told["parameters"]) == ("tiny", "quest", policy.model_dump(mode="json"))
    assert {"policy": told["policy"], **told["parameters"]} == to_dict(policy)
    assert [told[key] for key in ("backend", "runner", "isa", "self_check")] == ["CPU_ATTN", "V1", "avx2", "passed"]
    assert told["recall"] == {"sample": 0.01, "floor": 0.9, "action": "widen", "remedy": None}
    assert told["requests"] == {
        "per_request": True,
        "dense": {"allowed": True, "why_not": None},
        "budget": {"allowed": True, "why_not": None, "smallest_tokens": 112, "largest_tokens": 4096},
        "aliases": [
            f"tiny@{ending}" for ending in ("dense", "budget-512", "budget-1024", "budget-2048", "budget-4096")
        ],
    }


@pytest.mark.parametrize(
    ("policy", "sets", "dense", "budget", "remedy"),
    [
        ("quest", ["per_request=false"], "per_request=false", "per_request=false", "--set recall_sample=0.01"),
        ("streaming", [], "kv_memory=shared", "no budget", "--set kv_memory=shared"),
        ("streaming", ["kv_memory=shared"], None, "no budget", "--set recall_sample=0.01"),
    ],
)
def test_what_requests_may_not_ask_is_told_with_the_reason(
    policy: str, sets: list[str], dense: str | None, budget: str, remedy: str
) -> None:
    told = active_policy(find_policy(policy, sets, {}).policy("tiny"), "tiny", CollectorRegistry())
    assert told.requests.dense.allowed == (dense is None)
    assert dense is None or dense in (told.requests.dense.why_not or "")
    assert not told.requests.budget.allowed and budget in (told.requests.budget.why_not or "")
    assert told.requests.budget.smallest_tokens is None is told.requests.budget.largest_tokens
    assert told.requests.aliases == (["tiny@dense"] if dense is None else [])
    assert remedy in (told.recall.remedy or "")
    assert (told.backend, told.self_check) == (None, "unknown")  # no worker has said anything


def test_a_failed_self_check_is_told() -> None:
    registry = CollectorRegistry()
    Gauge("sparseserve_self_check", "check", ["policy"], registry=registry).labels("quest").set(0)
    assert active_policy(Quest(), "tiny", registry).self_check == "failed"


def test_numbers_of_the_workers_are_the_latest_and_add_up(client: TestClient) -> None:
    told = client.get("/v1/sparsity/live").json()
    assert told["density"] == 1000 / 2400
    assert told["tokens"] == [
        {"role": "dense", "attended": 1600, "resident": 1600},
        {"role": "select", "attended": 400, "resident": 3200},
    ]
    assert (told["decode_rows"], told["dense_rows"]) == (80, {"short": 14, "prefill": 6, "request": 4, "guard": 2})
    assert (told["recall_floor"], told["capacity_gain"]) == (0.9, 0.8)  # of each worker, not their sum
    assert (told["under_floor"], told["budget_widened"], told["dense_fallbacks"]) == ({"widen": 8}, 10, {"budget": 4})
    assert told["kv_bytes"] == {"full": 6e6, "window": 0, "summaries": 2e5, "dense_equivalent": 8e6}


def test_recall_is_told_by_layers_with_its_histogram(client: TestClient) -> None:
    told = client.get("/v1/sparsity/live").json()
    assert [group["layers"] for group in told["recall"]] == ["0-1", "2-9", "10-11"]
    unseen, low, high = told["recall"]
    assert (unseen["mean"], unseen["count"], sum(bucket["count"] for bucket in unseen["buckets"])) == (None, 0, 0)
    assert (low["mean"], low["count"]) == (pytest.approx(0.65), 4)
    assert [(bucket["at_most"], bucket["count"]) for bucket in low["buckets"]] == [
        (0.5, 2),
        (0.9, 2),
        (0.99, 0),
        (None, 0),
    ]
    assert [bucket["count"] for bucket in high["buckets"]] == [0, 0, 4, 0]
    assert [group["mean"] for group in told["output_error"]] == [None, pytest.approx(0.35), pytest.approx(0.04)]


def test_what_is_not_measured_is_null() -> None:
    unknown = live(CollectorRegistry()).model_dump()
    assert unknown.pop("time") > 0 and unknown.pop("tokens") == []
    assert set(unknown.values()) == {None}


def test_a_server_without_a_floor_has_none() -> None:
    registry = CollectorRegistry()
    Gauge("sparseserve_recall_floor", "floor", ["policy"], registry=registry).labels("quest").set(0)
    assert live(registry).recall_floor is None


def test_the_api_servers_own_numbers_are_told() -> None:
    registry = CollectorRegistry()
    requests = Counter("sparseserve_requests", "requests", ["choice", "outcome"], registry=registry)
    requests.labels("default", "ok").inc(6)
    requests.labels("budget", "rejected").inc()
    draining = Gauge("sparseserve_draining", "draining", registry=registry)
    said = live(registry)
    assert [(one.choice, one.outcome, one.count) for one in said.requests or []] == [
        ("budget", "rejected", 1),
        ("default", "ok", 6),
    ]
    assert said.draining is False
    draining.set(1)
    assert live(registry).draining is True


def test_with_several_api_servers_the_files_of_all_processes_are_read(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    worker = (
        "import prometheus_client as p; p.Counter('sparseserve_decode_rows', '', ['policy']).labels('quest').inc(3)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", worker], check=True)
    assert client.get("/v1/sparsity/live").json()["decode_rows"] == 6


def test_an_engine_too_busy_to_answer_leaves_the_latest_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseserve.server.views.metrics.SCRAPE_TIMEOUT", 0.05)
    registry, metrics = CollectorRegistry(), WorkerMetrics()
    registry.register(metrics)
    assert live(registry).decode_rows is None
    engine: Any = BusyEngine()  # in place of vLLM's client

    async def work() -> None:
        await metrics.refresh(engine)
        assert live(registry).decode_rows is None
        engine.free.set()
        await asyncio.sleep(0)  # what comes after the scrape is kept for the next
        engine.free.clear()
        await metrics.refresh(engine)

    asyncio.run(work())
    assert live(registry).decode_rows == 40


class BusyEngine:
    """Answers once it is free."""

    def __init__(self) -> None:
        self.free = asyncio.Event()

    async def collective_rpc(self, method: str) -> Any:
        await self.free.wait()
        return [busy_worker()]


def test_the_plan_of_a_budget_tells_all_layers_and_heads(client: TestClient) -> None:
    told = client.get("/v1/sparsity/plan").json()
    assert (told["length"], told["max_length"], told["dense_up_to"]) == (LONGEST, LONGEST, 1024)
    assert [(layer["layer"], layer["role"], layer["tokens"]) for layer in told["layers"]] == [
        (layer, "dense" if layer < 2 else "select", LONGEST if layer < 2 else 1024) for layer in range(LAYERS)
    ]
    assert told["layers"][0]["kv_heads"] == [{"reads": "all", "tokens": LONGEST}] * KV_HEADS
    assert told["layers"][5]["kv_heads"] == [{"reads": "budget", "tokens": 1024}] * KV_HEADS
    assert told["tokens_read"] == pytest.approx((2 + 4 / 8) / LAYERS)
    assert told["tokens_read"] < told["bytes_read"] < 1  # summaries are read, too
    assert told["bytes_stored"] == 33 / 32


def test_short_rows_read_everything(client: TestClient) -> None:
    told = client.get("/v1/sparsity/plan?length=1024").json()
    assert {head["reads"] for layer in told["layers"] for head in layer["kv_heads"]} == {"all"}
    assert (told["tokens_read"], told["bytes_read"]) == (1, 1)


def test_a_layer_that_reuses_a_selection_has_its_budget(plan: Any) -> None:
    roles = [
        (layer["role"], layer["dense_output"], layer["tokens"]) for layer in plan("tidal", "reselect_layer=4")["layers"]
    ]
    whole, budget = ("select", True, LONGEST), ("reuse", False, 1024)
    assert roles == [("dense", True, LONGEST), ("dense", True, LONGEST), whole, budget, whole, budget]


def test_heads_that_keep_everything_are_told_from_windows(plan: Any, tmp_path: Path) -> None:
    retrieval = {(0, 0), (1, 1), (2, 0)}
    heads = write_head_map(tmp_path / "heads.json", retrieval)
    told = plan("retrieval", f"artifact={heads}", "recent_tokens=188", "min_tokens=0", flags=("--block-size", "64"))
    everything = {
        (layer["layer"], head)
        for layer in told["layers"]
        for head, reads in enumerate(layer["kv_heads"])
        if reads == {"reads": "all", "tokens": LONGEST}
    }
    assert everything == retrieval
    window = told["layers"][0]["kv_heads"][1]
    assert window["reads"] == "window" and 192 <= window["tokens"] < 192 + 64  # starts at a page
    assert told["layers"][3]["tokens"] == window["tokens"]
    assert told["tokens_read"] == pytest.approx((3 + 9 * window["tokens"] / LONGEST) / 12)
    assert told["bytes_stored"] < 0.4


@pytest.mark.parametrize("flags", [(), ("--tensor-parallel-size", "2")])
def test_heads_of_all_ranks_are_in_the_models_order(plan: Any, tmp_path: Path, flags: tuple[str, ...]) -> None:
    alphas = [[256 * (1 + layer), 128, 4096, 128] for layer in range(LAYERS)]  # of the four query heads
    (file := tmp_path / "plan.json").write_text(json.dumps({"alphas": alphas, "betas": [[0.0] * 4] * LAYERS}))
    told = plan("moa", f"artifact={file}", flags=("--block-size", "64", *flags))
    for layer in told["layers"]:
        first, second = layer["kv_heads"]
        assert [first["reads"], second["reads"]] == ["window"] * KV_HEADS
        assert (first["tokens"], second["tokens"]) == (256 * (1 + layer["layer"]), 4096)
        assert layer["tokens"] == (first["tokens"] + second["tokens"]) / 2


@pytest.mark.parametrize("length", ["0", "-1", "8193", "many", "1e3", ""])
def test_lengths_that_no_row_can_have_are_refused(client: TestClient, length: str) -> None:
    refused = client.get("/v1/sparsity/plan", params={"length": length})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "query.length")


def test_the_schema_describes_every_field(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    paths = {path: schema["paths"][path]["get"] for path in PATHS}
    models = [paths[path]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"] for path in paths]
    assert models == [f"#/components/schemas/{name}" for name in ("ActivePolicy", "PlanView", "Live")]
    (length,) = paths["/v1/sparsity/plan"]["parameters"]
    assert length["schema"]["maximum"] == LONGEST and length["description"]
    for name in (
        "ActivePolicy",
        "RequestChoices",
        "Recall",
        "PlanView",
        "PlannedLayer",
        "HeadPlan",
        "Live",
        "LayerValues",
    ):
        described = schema["components"]["schemas"][name]
        assert described["description"]
        for field, value in described["properties"].items():
            assert value.get("description") or "$ref" in str(value), (name, field)


def test_without_an_engine_there_is_no_policy(tmp_path: Path) -> None:
    args, _ = configured(tmp_path)
    with served(args, None) as app:
        for path in PATHS:
            answer = TestClient(app).get(path)
            assert answer.status_code == 404
            assert "sparseserve serve" in answer.json()["error"]["message"]


def test_the_api_key_covers_the_numbers_and_not_the_page(tmp_path: Path) -> None:
    args, config = configured(tmp_path, "--api-key", "secret")
    with served(args, Workers(config, list), page="1") as app:
        client = TestClient(app)
        for path in PATHS:
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        page = client.get("/sparsity")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    directives = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    assert directives["script-src"].startswith("'sha256-") and "unsafe" not in str(directives)
    assert "http://" not in page.text.replace("http://www.w3.org/", "") and "https://" not in page.text


def test_the_page_is_off_unless_asked_for(client: TestClient) -> None:
    assert client.get("/sparsity").status_code == 404
