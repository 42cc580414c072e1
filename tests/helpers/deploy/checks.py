"""Run by `.venv-checks`, which has Helm and Kubernetes' schemas: one JSON request in, one JSON answer out.

`render`: a list of values; for each the manifests as text, what `helm lint` says, and the error if they are refused.
`validate`: a list of manifests; what their schemas have against each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

from tests.helpers.paths import DEPLOY

CHART = DEPLOY / "helm" / "sparseserve"
KUBERNETES = ("1.30", "1.37")  # the oldest that Chart.yaml allows, the newest with a schema
WARNING = 2


def render(values: dict[str, Any]) -> dict[str, Any]:
    """What the chart makes of `values`, as release `try` in namespace `apart`."""
    try:
        with helm.Chart.load(CHART) as chart:
            chart.validate_schema(values)
            files = chart.render(values, name="try", namespace="apart")
    except helm.HelmError as error:
        return {"error": str(error), "files": {}, "lint": []}
    lint = [message["error"] for message in helm.lint(CHART, values)["messages"] if message["severity"] >= WARNING]
    return {"error": "", "files": {Path(name).name: text for name, text in files.items()}, "lint": lint}


def validate(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest: Kubernetes' own schema, or ours of a custom resource."""
    schema = DEPLOY / "schemas" / f"{manifest['kind'].lower()}.yaml"
    if schema.exists():
        errors = Draft202012Validator(yaml.safe_load(schema.read_text())).iter_errors(manifest)
        return [f"{error.json_path}: {error.message}" for error in errors]
    try:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [error.message]
    return []


if __name__ == "__main__":
    answer = {"render": render, "validate": validate}[sys.argv[1]]
    print(json.dumps([answer(item) for item in json.load(sys.stdin)]))
