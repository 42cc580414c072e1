"""The Helm chart: good values give manifests that keep the laws, bad ones are refused with the key that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sparseserve.cli import app
from sparseserve.config import PolicySource, _Loader, read_policy_file
from sparseserve.server.launch.flags import parse
from tests.helpers.deploy.chart_values import BAD, DEMO, GOOD, QUEST
from tests.helpers.deploy.manifests import (
    CHECKS,
    Manifest,
    as_pods,
    ask,
    containers,
    laws,
    of_kind,
    pods,
    refers,
    servers,
)
from tests.helpers.deploy.observability import DASHBOARDS, FOLDER, RULES, names
from tests.helpers.paths import DEPLOY

pytestmark = pytest.mark.skipif(not CHECKS.exists(), reason="no .venv-checks: make .venv-checks/.installed")

HELM = DEPLOY / "helm"
EXTERNAL = {"PersistentVolumeClaim weights", "Secret sparseserve-api-key"}
EACH = pytest.mark.parametrize("case", GOOD)


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    return dict(zip(GOOD, ask("render", list(GOOD.values())), strict=True))


@pytest.fixture
def manifests(case: str, rendered: dict[str, dict[str, Any]]) -> list[Manifest]:
    assert not rendered[case]["error"]
    return parsed(rendered[case])


def parsed(answer: dict[str, Any]) -> list[Manifest]:
    """The manifests; a key that is written twice, which Helm lets pass, is an error."""
    files = [text for name, text in answer["files"].items() if name != "NOTES.txt"]
    return [manifest for text in files for manifest in yaml.load_all(text, _Loader) if manifest]


@EACH
def test_helm_has_nothing_to_say(case: str, rendered: dict[str, dict[str, Any]]) -> None:
    assert rendered[case]["lint"] == []


@EACH
def test_the_laws_hold(case: str, manifests: list[Manifest]) -> None:
    for law in laws():
        assert list(law(manifests)) == [], law.__doc__
    assert list(refers(manifests, EXTERNAL)) == []


def test_kubernetes_accepts_every_manifest(rendered: dict[str, dict[str, Any]]) -> None:
    manifests = [manifest for answer in rendered.values() for manifest in parsed(answer)]
    different = {json.dumps(manifest, sort_keys=True): manifest for manifest in manifests + as_pods(manifests)}
    for manifest, problems in zip(different.values(), ask("validate", list(different.values())), strict=True):
        assert not problems, manifest["metadata"]["name"]


@pytest.fixture(scope="module")
def refused() -> dict[str, str]:
    answers = ask("render", [values for values, _ in BAD.values()])
    return {case: answer["error"] for case, answer in zip(BAD, answers, strict=True)}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case: str, refused: dict[str, str]) -> None:
    assert BAD[case][1] in refused[case]


@EACH
@pytest.mark.vllm
def test_the_server_understands_its_options(case: str, manifests: list[Manifest]) -> None:
    values = {model["name"]: model for model in GOOD[case]["models"]}
    for pod, server in servers(manifests):
        command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]  # a group has commands
        context = command.make_context("serve", list(server["args"]))
        model = values[pod["metadata"]["labels"]["model"]]
        understood = parse(context.args)
        assert understood.model == model["model"]
        assert understood.shutdown_timeout == 30
        assert understood.served_model_name == [model.get("servedName", model["name"])]
        assert context.params["policy"] == "/etc/sparseserve/policies.yaml"
        for key, value in model.get("args", {}).items():
            assert getattr(understood, key.replace("-", "_"), context.params.get(key)) == value


@EACH
def test_the_server_accepts_its_policy(case: str, manifests: list[Manifest], tmp_path: Path) -> None:
    files = {one["metadata"]["name"]: one["data"] for one in of_kind(manifests, "ConfigMap")}
    for model in GOOD[case]["models"]:
        path = tmp_path / "policies.yaml"
        path.write_text(files[f"try-sparseserve-{model['name']}"]["policies.yaml"])
        policy = PolicySource(read_policy_file(str(path))).policy(model["model"])
        assert policy == PolicySource({"*": model["policy"]}).policy(model["model"])


def test_a_changed_policy_rolls_its_pods_alone() -> None:
    other, changed = DEMO | {"name": "other"}, DEMO | {"policy": QUEST | {"budget_tokens": 1024}}
    before, after = (
        pods(parsed(answer)) for answer in ask("render", [{"models": [DEMO, other]}, {"models": [changed, other]}])
    )
    assert before[0] != after[0] and before[1] == after[1]


@pytest.mark.parametrize("case", ["gpu"])
def test_monitoring_is_what_the_project_publishes(manifests: list[Manifest]) -> None:
    (rules,) = of_kind(manifests, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((FOLDER / "rules.yml").read_text())
    shown = next(
        one["data"] for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"].endswith("dashboards")
    )
    assert {Path(name).stem: json.loads(text) for name, text in shown.items()} == DASHBOARDS
    (monitor,) = of_kind(manifests, "PodMonitor")
    (target,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    labels = {
        one["targetLabel"]: one["replacement"] for one in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    }
    assert target["labels"].items() <= labels.items()


@pytest.mark.parametrize("case", ["replicas"])
def test_the_proxy_is_the_published_one_with_the_chosen_limit(manifests: list[Manifest]) -> None:
    (config,) = (one["data"]["nginx.conf"] for one in of_kind(manifests, "ConfigMap") if "nginx.conf" in one["data"])
    published = (DEPLOY / "nginx.conf").read_text().replace("rate=50r/s", "rate=1000r/s")
    assert config.rstrip() == published.replace("worker_processes auto", "worker_processes 2").rstrip()
    assert "rate=1000r/s" in config and "worker_processes 2;" in config


@pytest.mark.parametrize(("case", "open_to_all"), [("gpu", False), ("no proxy", True)])
def test_only_the_proxy_reaches_the_server(case: str, open_to_all: bool, manifests: list[Manifest]) -> None:
    for pod, server in servers(manifests):
        assert ("--host=0.0.0.0" in server["args"]) == open_to_all
        assert ("proxy" in [one["name"] for one in containers(pod)]) != open_to_all


@pytest.mark.parametrize("case", ["nobody admitted"])
def test_without_peers_nobody_is_admitted(manifests: list[Manifest]) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy["spec"]


@pytest.mark.parametrize(("case", "gpus"), [("gpu", [1]), ("cpu", [None]), ("multi-node", [8, 8])])
def test_pods_ask_for_the_gpus_of_their_share(case: str, gpus: list[int | None], manifests: list[Manifest]) -> None:
    found = [pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods(manifests)]
    assert found == gpus


@pytest.mark.parametrize("case", ["multi-node"])
def test_workers_outlast_the_leader_and_are_not_scraped(manifests: list[Manifest]) -> None:
    leader, worker = (
        pod["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] for pod in pods(manifests)
    )
    assert worker >= leader + 30
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods(manifests)} == {"server", "worker"}


@pytest.mark.parametrize("case", ["multi-node"])
def test_workers_wait_for_the_leader(manifests: list[Manifest], tmp_path: Path) -> None:
    """The command itself, with a leader that answers when it is asked for the third time."""
    calls = tmp_path / "calls"
    for name, text in {
        "ray": f'[ "$1" != health-check ] || [ "$(grep -c health {calls})" -eq 3 ]',
        "sleep": "",
    }.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {calls}\n{text}\n')
        (tmp_path / name).chmod(0o755)
    (worker,) = (one for pod in pods(manifests) for one in containers(pod) if one["name"] == "worker")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LWS_LEADER_ADDRESS": "large-0.large"}
    subprocess.run(worker["command"], env=env, check=True, timeout=20)
    asked = "ray health-check --address large-0.large:6379"
    started = "ray start --address=large-0.large:6379 --block"
    assert calls.read_text().splitlines() == [asked, "sleep 5", asked, "sleep 5", asked, started]


@pytest.mark.parametrize("case", ["nothing runs"])
def test_no_replicas_are_none(manifests: list[Manifest]) -> None:
    owners = of_kind(manifests, "Deployment") + of_kind(manifests, "LeaderWorkerSet")
    assert [owner["spec"]["replicas"] for owner in owners] == [0, 0]


@pytest.mark.parametrize(
    ("case", "offline"), [("gpu", True), ("a new claim", True), ("a hub", False), ("no network policy", False)]
)
def test_the_hub_is_asked_only_where_it_is_reached(case: str, offline: bool, manifests: list[Manifest]) -> None:
    ((_, server),) = servers(manifests)
    env = {variable["name"]: variable.get("value") for variable in server["env"]}
    assert ("HF_HUB_OFFLINE" in env) == offline
    assert ("HF_HOME" in env) == (case != "gpu")


@pytest.mark.parametrize(("case", "threads"), [("cpu", "3"), ("ranks on the CPU", "1"), ("threads of its own", "2")])
def test_threads_follow_from_the_limit(case: str, threads: str, manifests: list[Manifest]) -> None:
    ((_, server),) = servers(manifests)
    assert {"name": "OMP_NUM_THREADS", "value": threads} in server["env"]


def test_scalers_ask_for_metrics_and_labels_that_exist(rendered: dict[str, dict[str, Any]]) -> None:
    manifests = [manifest for answer in rendered.values() for manifest in parsed(answer)]
    known = set.union(*(names(rule["expr"]) for rule in RULES))  # a live server has them: test_live_metrics
    (adapter,) = yaml.safe_load((HELM / "examples" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    renamed = {re.sub(adapter["name"]["matches"], "vllm_\\1", name) for name in known}
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} <= renamed
    (monitor,) = (one["spec"] for one in of_kind(parsed(rendered["gpu"]), "PodMonitor"))
    relabelled = {one["targetLabel"] for one in monitor["podMetricsEndpoints"][0]["relabelings"]}
    (scaled,) = of_kind(manifests, "ScaledObject")
    for query in (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]):
        assert names(query) and names(query) <= known
        assert set(re.findall(r"(\w+)=", query)) == relabelled | {*monitor["podTargetLabels"], "namespace"}


@pytest.mark.parametrize(
    ("case", "warned"),
    [
        ("gpu", []),
        ("cpu", ["No API key", "Nothing is scraped"]),
        ("no proxy", ["No API key", "The proxy is off"]),
        ("a new claim", ["No API key", "org/name must be in the volume", "Nothing is scraped"]),
    ],
)
def test_the_notes_warn_of_what_is_open_or_missing(
    case: str, warned: list[str], rendered: dict[str, dict[str, Any]]
) -> None:
    notes = rendered[case]["files"]["NOTES.txt"]
    warnings = ["No API key", "The proxy is off", "org/name must be in the volume", "Nothing is scraped"]
    assert [warning for warning in warnings if warning in notes] == warned


def test_images_start_as_the_chart_expects() -> None:
    for text in ((DEPLOY / f"Dockerfile.{device}").read_text() for device in ("cuda", "cpu")):
        assert 'ENTRYPOINT ["sparseserve", "serve"]' in text
        assert "USER 10001:10001" in text and "HOME=/home/sparseserve" in text


def test_the_proxy_is_the_image_of_the_compose_stack() -> None:
    values = yaml.safe_load((HELM / "sparseserve" / "values.yaml").read_text())
    assert (
        values["proxy"]["image"] == yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["nginx"]["image"]
    )
