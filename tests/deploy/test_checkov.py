"""checkov finds nothing in what the chart and the overlays render and in the images, but what has its reason here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.deploy.chart_values import GOOD
from tests.helpers.deploy.manifests import CHECKS, as_pods, ask
from tests.helpers.paths import DEPLOY

pytestmark = pytest.mark.skipif(not CHECKS.exists(), reason="no .venv-checks: make .venv-checks/.installed")

SKIPPED = {
    "CKV_K8S_15": "pullPolicy Always: pods should start while the registry is away; images are named by digest",
    "CKV_K8S_35": "the key as a file: vLLM reads it from VLLM_API_KEY or from its arguments, where everybody sees it",
}
WORKER = {
    ("CKV_K8S_8", "Pod.apart.worker"): "liveness: nothing listens on a worker; it ends with Ray, and with it its group",
    ("CKV_K8S_9", "Pod.apart.worker"): "readiness: no Service sends requests to a worker",
}
OVERLAY = {
    ("CKV_K8S_43", "Deployment.sparseserve.sparseserve"): "a digest: the image is built by its user, who has one then",
}
BASE = {
    ("CKV_DOCKER_7", "/Dockerfile.FROM"): "a version: FROM names an argument, which holds a digest (test_images.py)",
}
PINNED = "registry.example/sparseserve@sha256:" + 64 * "0"
CASES = ("gpu", "cpu", "multi-node", "replicas", "a new claim", "no proxy", "a key")
RESOURCES = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


def failed(folder: Path, framework: str) -> set[tuple[str, str]]:
    """(check, resource) of what checkov has against a folder."""
    command = [str(CHECKS / "checkov"), "--directory", str(folder), "--framework", framework, "--skip-download"]
    command += ["--output", "json", "--quiet", "--skip-check", ",".join(SKIPPED)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert report["summary"]["passed"] > 0 and report["summary"]["parsing_errors"] == 0
    return {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}


def test_the_chart(tmp_path: Path) -> None:
    for case, values in ((case, GOOD[case]) for case in CASES):
        pinned = [{"resources": RESOURCES} | model | {"image": PINNED} for model in values["models"]]
        (answer,) = ask("render", [values | {"models": pinned}])
        files = [text for name, text in answer["files"].items() if name != "NOTES.txt"]
        found = [manifest for text in files for manifest in yaml.safe_load_all(text) if manifest]
        (tmp_path / f"{case.replace(' ', '-')}.yaml").write_text(yaml.safe_dump_all(found + as_pods(found)))
    assert failed(tmp_path, "kubernetes") == set(WORKER)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not installed")
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay(overlay: str, tmp_path: Path) -> None:
    command = ["kubectl", "kustomize", str(DEPLOY / "kustomize" / "overlays" / overlay)]
    (tmp_path / "rendered.yaml").write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert failed(tmp_path, "kubernetes") == set(OVERLAY)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image(kind: str, tmp_path: Path) -> None:
    shutil.copy(DEPLOY / f"Dockerfile.{kind}", tmp_path / "Dockerfile")
    assert failed(tmp_path, "dockerfile") == set(BASE)
