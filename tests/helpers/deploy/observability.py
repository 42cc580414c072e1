"""Where the files under test lie, and what their expressions name."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.helpers.paths import DEPLOY

FOLDER = DEPLOY / "observability"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "grafana").glob("*.json"))
}
# A metric's name, and its labels if it has some; the words of PromQL hold no colon and begin otherwise.
SELECTOR = re.compile(r"(?<![\w:\"])((?:[a-z_]+:)?(?:sparseserve_|vllm:|http_|process_)[\w:]+|up)\b(\{[^}]*\})?")


def selectors(expression: str) -> list[str]:
    """`name{labels}` of every series that an expression asks for."""
    return ["".join(match) for match in SELECTOR.findall(expression)]


def names(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    return {name for name, _ in SELECTOR.findall(expression)}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """What the panels ask for."""
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
