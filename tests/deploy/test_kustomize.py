"""The manifests for those without Helm keep the same laws."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from manifests import CHECKS, Manifest, ask, connects, drains, hides, locks, of_kind, refers, selects, servers
from observability import DEPLOY

from sparseserve.config import PolicySource, read_policy_file

pytestmark = [
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not installed"),
    pytest.mark.skipif(not CHECKS.exists(), reason="no .venv-checks: make .venv-checks/.installed"),
]
EXTERNAL = {"PersistentVolumeClaim weights", "Secret sparseserve-api-key"}
MODELS = {"cpu": "/models/demo", "gpu": "/models/Llama-3.1-8B-Instruct"}


@pytest.fixture(params=MODELS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def manifests(overlay: str) -> list[Manifest]:
    return rendered(DEPLOY / "kustomize", overlay)


def rendered(folder: Path, overlay: str) -> list[Manifest]:
    command = ["kubectl", "kustomize", str(folder / "overlays" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def test_the_laws_hold(manifests: list[Manifest]) -> None:
    for law in (drains, selects, connects, locks, hides):
        assert list(law(manifests)) == [], law.__doc__
    assert list(refers(manifests, EXTERNAL)) == []


def test_kubernetes_accepts_every_manifest(manifests: list[Manifest]) -> None:
    assert not any(ask("validate", manifests))


def test_the_network_admits_clients_and_prometheus(manifests: list[Manifest]) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    ((clients, prometheus),) = (rule["from"] for rule in policy["spec"]["ingress"])
    assert clients == {"podSelector": {"matchLabels": {"sparseserve-client": "true"}}}
    assert prometheus == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def test_the_model_and_its_policy_are_served(overlay: str, manifests: list[Manifest], tmp_path: Path) -> None:
    ((_, server),) = servers(manifests)
    assert server["args"][0] == MODELS[overlay]
    assert server["image"] == f"sparseserve:0.1.0-{'cuda' if overlay == 'gpu' else 'cpu'}"
    (config,) = of_kind(manifests, "ConfigMap")
    path = tmp_path / "policies.yaml"
    path.write_text(config["data"]["policies.yaml"])
    assert PolicySource(read_policy_file(str(path))).policy(MODELS[overlay]).name == "quest"


def test_a_changed_policy_rolls_the_pods(overlay: str, manifests: list[Manifest], tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kustomize", tmp_path, dirs_exist_ok=True)
    (tmp_path / "base" / "policies.yaml").write_text('models: {"*": {policy: dense}}')
    assert servers(rendered(tmp_path, overlay)) != servers(manifests)
