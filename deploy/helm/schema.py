"""Write the chart's values.schema.json: schema.yaml, and the policies as deploy/policy.schema.json has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TARGET = HERE / "sparseserve" / "values.schema.json"


def rendered() -> str:
    """What the file should hold."""
    schema = yaml.safe_load((HERE / "schema.yaml").read_text())
    published = json.loads((HERE.parent / "policy.schema.json").read_text())
    entry = published["properties"]["models"]["additionalProperties"]
    schema["definitions"]["policy"] = by_name([ref["$ref"] for ref in entry["oneOf"]], published["$defs"])
    return json.dumps(schema | {"$defs": published["$defs"]}, indent=2) + "\n"


def by_name(refs: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """The `oneOf` of policies, chosen by name: Helm then reports the errors of one policy, not of each."""
    names = [definitions[ref.rpartition("/")[2]]["properties"]["policy"]["const"] for ref in refs]
    chosen = [
        {"if": {"properties": {"policy": {"const": name}}}, "then": {"$ref": ref}}
        for name, ref in zip(names, refs, strict=True)
    ]
    properties = {"policy": {"enum": names}}
    return {"type": "object", "required": ["policy"], "properties": properties, "allOf": chosen}


if __name__ == "__main__":
    TARGET.write_text(rendered())
