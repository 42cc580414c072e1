"""The Grafana dashboards in `grafana/`, from the panels in `panels/`."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVER = 'job=~"$job", instance=~"$instance"'
LABELS = {"SERVER": SERVER, "MODEL": f'{SERVER}, model_name=~"$model_name"'}
WIDTH, PANEL_HEIGHT, MOST_IN_A_LINE = 24, 8, 3  # of Grafana's grid
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
VARIABLES = {
    "job": "label_values(vllm:num_requests_running, job)",
    "instance": 'label_values(vllm:num_requests_running{job=~"$job"}, instance)',
    "model_name": f"label_values(vllm:num_requests_running{{{SERVER}}}, model_name)",
    "floor": f"label_values(sparseserve_attention_recall_bucket{{{SERVER}}}, le)",
}
ON_TIME_RANGE_CHANGE, NUMERIC = 2, 3  # when Grafana asks for a variable's values, and how it sorts them
SEVERAL = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
FLOOR = {"current": {"text": "0.9", "value": "0.9"}}  # a bucket of the histogram


def dashboard(spec: dict[str, Any]) -> dict[str, Any]:
    """The dashboard of a file in `panels/`, in Grafana's classic JSON model."""
    return {
        "id": None,
        "uid": spec["uid"],
        "title": spec["title"],
        "tags": ["sparseserve", "vllm"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), *map(_variable, spec["variables"])]},
        "panels": _grid(spec["rows"]),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": VARIABLES[name], "refId": name},
        "refresh": ON_TIME_RANGE_CHANGE,
        "sort": NUMERIC,
    } | (FLOOR if name == "floor" else SEVERAL)


def _grid(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row's title, and its panels in lines below."""
    numbers, y = count(1), 0
    placed = []
    for row in rows:
        placed.append(_row(row["title"], next(numbers), y))
        y += 1
        for line in _lines(row["panels"]):
            width = WIDTH // len(line)
            placed += [_panel(panel, next(numbers), width * x, y, width) for x, panel in enumerate(line)]
            y += PANEL_HEIGHT
    return placed


def _lines(panels: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """As few lines as hold the panels, and as even."""
    lines = -(-len(panels) // MOST_IN_A_LINE)
    size = -(-len(panels) // lines)
    return [panels[first : first + size] for first in range(0, len(panels), size)]


def _row(title: str, number: int, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "gridPos": place, "collapsed": False, "panels": []}


def _panel(spec: dict[str, Any], number: int, x: int, y: int, width: int) -> dict[str, Any]:
    kind = spec.get("type", "timeseries")
    return {
        "id": number,
        "type": kind,
        "title": spec["title"],
        "description": spec["description"],
        "datasource": DATASOURCE,
        "gridPos": {"h": PANEL_HEIGHT, "w": width, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": spec["unit"]}, "overrides": []},
        "options": {"textMode": spec["text"]} if "text" in spec else {},
        "targets": [_target(query, chr(ord("A") + i)) for i, query in enumerate(_queries(spec))],
    }


def _queries(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if "queries" in spec:
        queries: list[dict[str, Any]] = spec["queries"]
        return queries
    rates = f"sum by (le) (rate({spec['quantiles']}_bucket{{MODEL}}[$__rate_interval]))"
    return [{"expr": f"histogram_quantile({share}, {rates})", "legend": name} for name, share in QUANTILES.items()]


def _target(query: dict[str, Any], letter: str) -> dict[str, Any]:
    expression = query["expr"]
    for word, labels in LABELS.items():
        expression = expression.replace(f"{{{word}", f"{{{labels}")
    kind = {"instant": True, "range": False} if query.get("instant") else {"instant": False, "range": True}
    return {"refId": letter, "datasource": DATASOURCE, "expr": expression, "legendFormat": query["legend"]} | kind


def rendered() -> dict[Path, str]:
    """What every file in `grafana/` holds."""
    specs = [yaml.safe_load(path.read_text()) for path in sorted((HERE / "panels").glob("*.yaml"))]
    return {HERE / "grafana" / f"{spec['uid']}.json": json.dumps(dashboard(spec), indent=2) + "\n" for spec in specs}
