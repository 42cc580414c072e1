"""Writes what follows from the policies and from the dashboards' panels: `make generate`."""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from deploy.capacity import capacity
from deploy.markdown import table
from deploy.observability import dashboards
from sparseserve.config import policy_file_schema
from sparseserve.plugin.support.table import support_table
from sparseserve.policies import POLICIES, Policy
from sparseserve.policies.budget import ScorePolicy

HERE = Path(__file__).parent
README, RUNBOOK, HELM = HERE.parent / "README.md", HERE / "RUNBOOK.md", HERE / "helm"
BEGIN, END = "<!-- {}: begin, from make generate -->\n", "<!-- end -->"


def generated() -> dict[Path, str]:
    """What every generated file should hold."""
    return {
        HERE / "policy.schema.json": policy_schema(),
        HELM / "sparseserve" / "values.schema.json": values_schema(),
        README: readme(README.read_text()),
        RUNBOOK: runbook(RUNBOOK.read_text()),
        **dashboards.rendered(),
    }


def policy_schema() -> str:
    """JSON Schema of the policy file."""
    return json.dumps(policy_file_schema(), indent=2) + "\n"


def values_schema() -> str:
    """JSON Schema of the chart's values: helm/schema.yaml, and the policies as in a policy file."""
    schema, published = yaml.safe_load((HELM / "schema.yaml").read_text()), policy_file_schema()
    entry = published["properties"]["models"]["additionalProperties"]
    schema["definitions"]["policy"] = _by_name([ref["$ref"] for ref in entry["oneOf"]])
    return json.dumps(schema | {"$defs": published["$defs"]}, indent=2) + "\n"


def _by_name(refs: list[str]) -> dict[str, Any]:
    """The `oneOf` of policies, chosen by name: Helm then reports the errors of one policy, not of each."""
    chosen = [
        {"if": {"properties": {"policy": {"const": name}}}, "then": {"$ref": ref}}
        for name, ref in zip(POLICIES, refs, strict=True)
    ]
    properties = {"policy": {"enum": list(POLICIES)}}
    return {"type": "object", "required": ["policy"], "properties": properties, "allOf": chosen}


def readme(text: str) -> str:
    """The README with its tables of policies."""
    tables = {"policies": policies(), "choices": choices(), "support": support_table()}
    return reduce(lambda text, name: between_marks(text, name, tables[name]), tables, text)


def runbook(text: str) -> str:
    """The runbook with its table of KV tokens for each GiB."""
    return between_marks(text, "capacity", capacity())


def policies() -> str:
    """What every policy reads."""
    rows = [(f"`{name}`", cls.description, _papers(cls)) for name, cls in POLICIES.items()]
    return table(("policy", "what a head reads in a decode step", "paper"), *rows)


def choices() -> str:
    """What can be had under every policy."""
    head = ("policy", "recall, guard", "`sparse_policy: dense`", "`sparse_budget_tokens`, `widen`")
    return table(head, *((f"`{name}`", *_choices(cls)) for name, cls in POLICIES.items()))


def _choices(cls: type[Policy]) -> tuple[str, str, str]:
    given = "with `kv_memory=shared`" if "kv_memory" in cls.model_fields else "yes"
    recall = given if cls.is_sparse else "nothing is lost"
    return recall, given, "yes" if issubclass(cls, ScorePolicy) else "no"


def _papers(cls: type[Policy]) -> str:
    return ", ".join(f"[{title}]({address})" for title, address in cls.papers.items())


def between_marks(text: str, name: str, rows: str) -> str:
    """The text with a table between the lines that mark its place."""
    begin = BEGIN.format(name)
    changed, found = re.subn(f"({begin}).*?({END})", lambda match: match[1] + rows + match[2], text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{begin!r} stands {found} times before a {END!r}; it must stand once")
    return changed


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
