"""checkov finds nothing in what the chart and the overlays render, but what is skipped here, each with its reason."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from chart_values import GOOD
from manifests import CHECKS, as_pods, ask

pytestmark = pytest.mark.skipif(
    not (CHECKS.exists() and shutil.which("checkov")), reason="checkov is run by hand, see deploy/helm/README.md"
)

SKIPPED = {
    "CKV_K8S_15": "pullPolicy Always: pods should start while the registry is away; images are named by digest",
    "CKV_K8S_35": "the key as a file: vLLM reads it from VLLM_API_KEY or from its arguments, where everybody sees it",
}
WORKER = {
    ("CKV_K8S_8", "Pod.apart.worker"): "liveness: nothing listens on a worker; it ends with Ray, and with it its group",
    ("CKV_K8S_9", "Pod.apart.worker"): "readiness: no Service sends requests to a worker",
}
PINNED = "registry.example/sparseserve@sha256:" + 64 * "0"
CASES = ("gpu", "cpu", "multi-node", "replicas", "a new claim", "no proxy", "a key")
RESOURCES = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


def test_checkov_finds_nothing(tmp_path: Path) -> None:
    for case, values in ((case, GOOD[case]) for case in CASES):
        pinned = [{"resources": RESOURCES} | model | {"image": PINNED} for model in values["models"]]
        (answer,) = ask("render", [values | {"models": pinned}])
        files = [text for name, text in answer["files"].items() if name != "NOTES.txt"]
        found = [manifest for text in files for manifest in yaml.safe_load_all(text) if manifest]
        (tmp_path / f"{case.replace(' ', '-')}.yaml").write_text(yaml.safe_dump_all(found + as_pods(found)))
    command = ["checkov", "--directory", str(tmp_path), "--framework", "kubernetes", "--skip-download"]
    command += ["--output", "json", "--quiet", "--skip-check", ",".join(SKIPPED)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    failed = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert failed == set(WORKER) and report["summary"]["passed"] > 0
