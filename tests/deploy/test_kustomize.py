"""The manifests for those without Helm keep the same laws."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sparseserve.config import PolicySource, read_policy_file
from tests.helpers.deploy.manifests import CHECKS, Manifest, ask, laws, of_kind, refers, servers
from tests.helpers.paths import DEPLOY

pytestmark = [
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not installed"),
    pytest.mark.skipif(not CHECKS.exists(), reason="no .venv-checks: make .venv-checks/.installed"),
]
EXTERNAL = {"PersistentVolumeClaim weights", "Secret sparseserve-api-key"}
BLOCKS = re.findall(r"```bash\n(.*?)```", (DEPLOY / "helm" / "README.md").read_text(), re.DOTALL)
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
    for law in laws():
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


def test_everything_is_in_the_namespace_that_is_made_first(manifests: list[Manifest]) -> None:
    (namespace,) = of_kind(manifests, "Namespace")
    others = [one["metadata"]["namespace"] for one in manifests if one is not namespace]
    assert set(others) == {namespace["metadata"]["name"]}


def test_the_readme_makes_first_what_the_overlays_need() -> None:
    (block,) = (text for text in BLOCKS if "apply --kustomize" in text)
    before, _, _ = block.partition("apply --kustomize")
    claim = yaml.safe_load(before.partition("<<'EOF'\n")[2].partition("\nEOF\n")[0])
    made = {f"{claim['kind']} {claim['metadata']['name']}", *re.findall("create (secret) generic (\\S+)", before)}
    assert made == {"PersistentVolumeClaim weights", ("secret", "sparseserve-api-key")}
    assert not any(ask("validate", [claim]))
    assert (DEPLOY.parent / re.findall(r"apply --filename (deploy/\S+)", before)[0]).exists()
    assert before.count("kubectl --namespace sparseserve ") == 2


def test_a_changed_policy_rolls_the_pods(overlay: str, manifests: list[Manifest], tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kustomize", tmp_path, dirs_exist_ok=True)
    (tmp_path / "base" / "policies.yaml").write_text('models: {"*": {policy: dense}}')
    assert servers(rendered(tmp_path, overlay)) != servers(manifests)
