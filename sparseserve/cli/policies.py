"""`sparseserve policies`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from sparseserve.policies import Policy


def policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a policy file.")] = False,
) -> None:
    """List the policies and their hyper-parameters."""
    from sparseserve.config import policy_file_schema  # imports torch
    from sparseserve.policies import POLICIES

    if schema:
        print(json.dumps(policy_file_schema(), indent=2))
    elif as_json:
        print(json.dumps([describe(cls) for cls in POLICIES.values()], indent=2))
    else:
        Console().print(_table([describe(cls) for cls in POLICIES.values()]))


def describe(cls: type[Policy]) -> dict[str, Any]:
    """A policy in JSON-able words."""
    properties = cls.model_json_schema()["properties"]
    parameters = {key: {k: v for k, v in spec.items() if k != "title"} for key, spec in properties.items()}
    paper = next(iter(cls.papers.values()), None)
    return {"name": cls.name, "description": cls.description, "paper": paper, "parameters": parameters}


def _table(described: list[dict[str, Any]]) -> Table:
    table = Table("policy", Column("what it reads", overflow="fold"), "--set KEY=VALUE, default", show_lines=True)
    for policy in described:
        about = "\n".join(filter(None, [policy["description"], policy["paper"]]))
        defaults = [f"{key}={spec.get('default', '(required)')}" for key, spec in policy["parameters"].items()]
        table.add_row(policy["name"], about, "\n".join(defaults))
    return table
