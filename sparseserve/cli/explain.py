"""`sparseserve explain`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from sparseserve.cli.extras import VLLM, need
from sparseserve.cli.numbers import whole_numbers

if TYPE_CHECKING:
    from sparseserve.footprint.planned import RowMemory
    from sparseserve.footprint.stores import Memory
    from sparseserve.server.launch.explain import Explanation


def explain(
    ctx: typer.Context,
    policy: Annotated[str, typer.Option(metavar="NAME|FILE", help="A policy, or a file with one for each model.")] = "",
    pairs: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter; repeatable.")
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Context lengths in tokens.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict what MODEL reads and stores of the KV cache under a policy, without its weights.

    Every other option goes to vLLM as in `serve`, for example --block-size 64 or --max-model-len 32768.
    """
    need(VLLM, "vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to stdout
    from sparseserve.config import find_policy
    from sparseserve.server.launch.explain import explain  # imports vllm

    tokens = whole_numbers("--lengths", lengths) if lengths else []
    explained = describe(explain(find_policy(policy, pairs or [], os.environ), ctx.args, tokens))
    if as_json:
        print(json.dumps(explained, indent=2))
    else:
        _print(explained)


def describe(explained: Explanation) -> dict[str, Any]:
    """An explanation in JSON-able words; bytes are those of one rank."""
    model = explained.model
    return {
        "model": model.name,
        "policy": explained.policy.name,
        "layers": model.layers,
        "page_tokens": model.page_size,
        "dense_up_to": explained.policy.dense_up_to,
        "unit_tokens": explained.policy.selection_unit if explained.policy.selection_units(model.max_len) else None,
        "kv_bytes_per_token": explained.kv_bytes * model.layers,
        "page_state_bytes_per_page": explained.page_state_bytes * model.layers,
        "page_state_bytes_per_token": explained.page_state_bytes * model.layers / model.page_size,
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
        "memory": {
            "kv_memory": "per_head" if explained.policy.frees_pages else "shared",
            "page_slots": explained.memory.slots,
            "page_bytes": explained.memory.page_bytes + explained.memory.page_state_bytes,
            "rows": [_row(row, explained.memory) for row in explained.rows],
        },
    }


def _row(row: RowMemory, memory: Memory) -> dict[str, Any]:
    """What a row stores, in JSON-able words."""
    groups = [(group, group.pages(row.length, memory.page_size)) for group in memory.groups]
    return {
        "length": row.length,
        "groups": [
            {
                "kv_heads": group.heads,
                "first_and_last_tokens": group.ends(row.length),
                "page_tables": group.tables,
                "pages": pages,
                "slots": group.tables * memory.slots,
                "empty_slots": group.tables * memory.slots - group.heads,
                "bytes": pages * memory.page_bytes,
            }
            for group, pages in groups
        ],
        "page_state_bytes": row.stored.page_state,
        "bytes": row.stored.bytes,
        "dense_bytes": row.stored.dense,
        "ratio_to_dense": row.stored.ratio,
        "rounding_cost": row.rounding,
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
    per_head = explained["memory"]["kv_memory"] == "per_head"
    if per_head:
        console.print(_stored(explained["memory"]["rows"]))
    for line in [*(_per_head_notes if per_head else _shared_notes)(explained), *_tile_notes(explained)]:
        console.print(line, highlight=False)


def _stored(rows: list[dict[str, Any]]) -> Table:
    """What rows store, by the heads that keep the same."""
    heads, *numbers = (
        Column(name, justify="right") for name in ("KV heads", "pages", "empty slots", "stored", "less than dense")
    )
    table = Table("context", heads, "keep", *numbers, title="what one row stores")
    for row in rows:
        for group in row["groups"]:
            window = group["first_and_last_tokens"]
            keep = "everything" if window is None else f"first {window[0]}, last {window[1]}"
            empty = f"{group['empty_slots']} of {group['slots']}"
            table.add_row(
                str(row["length"]), str(group["kv_heads"]), keep, str(group["pages"]), empty, _size(group["bytes"]), ""
            )
        all_heads, pages = (str(sum(group[key] for group in row["groups"])) for key in ("kv_heads", "pages"))
        ratio = f"{row['ratio_to_dense']:.2f}x"
        table.add_row(str(row["length"]), all_heads, "all", pages, "", _size(row["bytes"]), ratio, style="bold")
        table.add_section()
    return table


def _per_head_notes(explained: dict[str, Any]) -> list[str]:
    memory, page, longest = explained["memory"], explained["page_tokens"], explained["memory"]["rows"][-1]
    return [
        f"Memory: a page has {memory['page_slots']} slots, each {page} tokens of one KV head: "
        f"{_size(memory['page_bytes'])}.",
        f"Windows that were rounded up, empty slots and padding cost {longest['rounding_cost']:.1%} over what heads "
        f"need by themselves at {longest['length']} tokens.",
        f"Rows of up to {explained['dense_up_to']} tokens attend to everything and keep it.",
    ]


def _shared_notes(explained: dict[str, Any]) -> list[str]:
    per_page, per_token = explained["page_state_bytes_per_page"], explained["page_state_bytes_per_token"]
    share, ratio = per_token / explained["kv_bytes_per_token"], explained["memory"]["rows"][-1]["ratio_to_dense"]
    return [
        f"Memory: all heads keep everything, {_size(explained['kv_bytes_per_token'])} per token; for summaries "
        f"{_size(per_token)} more ({share:.1%}), {_size(per_page)} per page of {explained['page_tokens']} tokens: "
        f"{ratio:.2f}x less than dense.",
        f"Rows of up to {explained['dense_up_to']} tokens take vLLM's own attention.",
    ]


def _tile_notes(explained: dict[str, Any]) -> list[str]:
    if (unit := explained["unit_tokens"]) is not None and unit < 32:
        return [f"On the CPU keys come in tiles of 32: units of {unit} read up to {32 // unit} times the keys."]
    return []


def _size(count: float) -> str:
    """Bytes as `1.50 MB`, decimal."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
