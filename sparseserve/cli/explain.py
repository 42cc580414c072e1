"""`sparseserve explain`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseserve.errors import ConfigError

if TYPE_CHECKING:
    from sparseserve.server.explain import Explanation


def explain(
    ctx: typer.Context,
    policy: Annotated[str, typer.Option(metavar="NAME|FILE", help="A policy, or a file with one for each model.")] = "",
    pairs: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter; repeatable.")
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Context lengths in tokens.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict what MODEL reads of the KV cache in a decode step under a policy, without its weights.

    Every other option goes to vLLM as in `serve`, for example --block-size 64 or --max-model-len 32768.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to stdout
    from sparseserve.config import find_policy
    from sparseserve.server.explain import explain  # imports vllm

    explained = describe(explain(find_policy(policy, pairs or [], os.environ), ctx.args, _lengths(lengths)))
    if as_json:
        print(json.dumps(explained, indent=2))
    else:
        _print(explained)


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError("--lengths", text, "tokens, for example 4096,32768", remedy="give whole numbers") from None


def describe(explained: Explanation) -> dict[str, Any]:
    """An explanation in JSON-able words; bytes are those of one rank."""
    model = explained.model
    return {
        "model": model.name,
        "policy": explained.policy.name,
        "layers": model.layers,
        "page_tokens": model.page_size,
        "dense_up_to": explained.policy.dense_up_to,
        "unit_tokens": explained.policy.selection_unit if explained.policy.selection_slots(model.max_len) else None,
        "kv_bytes_per_token": explained.kv_bytes * model.layers,
        "summary_bytes_per_page": explained.summary_bytes * model.layers,
        "summary_bytes_per_token": explained.summary_bytes * model.layers / model.page_size,
        "steps": [
            {
                "length": step.length,
                "roles": [
                    {
                        "role": role.role.value,
                        "layers": role.layers,
                        "tokens": role.tokens,
                        "kv_bytes": role.kv_bytes,
                        "scored_bytes": role.scored_bytes,
                    }
                    for role in step.roles
                ],
                "bytes": step.bytes,
                "dense_bytes": step.dense_bytes,
                "ratio_to_dense": step.ratio,
            }
            for step in explained.steps
        ],
    }


def _print(explained: dict[str, Any]) -> None:
    title = f"{explained['policy']} on {explained['model']}: what one row reads of the KV cache in a decode step"
    table = Table("context", "layers", "tokens a head", "KV", "to choose", "all", "less than dense", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for step in explained["steps"]:
        for role in step["roles"]:
            layers = f"{role['layers']} {role['role']}"
            read = role["kv_bytes"] + role["scored_bytes"]
            sizes = map(_size, (role["kv_bytes"], role["scored_bytes"], read))
            table.add_row(str(step["length"]), layers, f"{role['tokens']:.0f}", *sizes, "")
        table.add_row(
            str(step["length"]), "all", "", "", "", _size(step["bytes"]), f"{step['ratio_to_dense']:.2f}x", style="bold"
        )
        table.add_section()
    console = Console()
    console.print(table)
    for line in _notes(explained):
        console.print(line, highlight=False)


def _notes(explained: dict[str, Any]) -> list[str]:
    per_page, per_token = explained["summary_bytes_per_page"], explained["summary_bytes_per_token"]
    share = per_token / explained["kv_bytes_per_token"]
    notes = [
        f"Memory: {_size(explained['kv_bytes_per_token'])} per token; for summaries {_size(per_token)} more "
        f"({share:.1%}), {_size(per_page)} per page of {explained['page_tokens']} tokens.",
        f"Rows of up to {explained['dense_up_to']} tokens take vLLM's own attention.",
    ]
    if (unit := explained["unit_tokens"]) is not None and unit < 32:
        notes.append(f"On the CPU keys come in tiles of 32: units of {unit} read up to {32 // unit} times the keys.")
    return notes


def _size(count: float) -> str:
    """Bytes as `1.50 MB`, decimal."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
