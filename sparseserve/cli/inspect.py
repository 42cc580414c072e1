"""`sparseserve inspect`."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from sparseserve.cli.convert import LENGTH
from sparseserve.cli.extras import need
from sparseserve.errors import ConfigError

if TYPE_CHECKING:
    from sparseserve.artifacts import Artifact

BARS = "▁▂▃▄▅▆▇█"


def inspect(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="An artifact, or what `convert` takes.")],
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the layer x head map.")] = None,
    length: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Row length at which spans are told.")] = LENGTH,
) -> None:
    """Print an artifact, layer by layer, and draw what it says about every head."""
    from sparseserve.artifacts import headline, load  # imports torch

    artifact = load(source)
    console = Console()
    console.print(headline(artifact, length), highlight=False)
    console.print(_about(artifact))
    console.print(_layers(artifact, length))
    if plot:
        _draw(artifact, length, plot)
        print(f"drew {plot}")


def _about(artifact: Artifact) -> Table:
    facts: dict[str, Any] = {
        "policy": artifact.kind,
        "layers": artifact.layers,
        "heads": artifact.heads,
        "KV heads": artifact.kv_heads,
        "head dim": artifact.head_dim,
        "model": artifact.model,
        "sha256 of the source": artifact.sha256,
        "sha256 of config.json": artifact.config_sha256,
        **artifact.arguments,
    }
    table = Table("key", Column("value", overflow="fold"))
    for key, value in facts.items():
        table.add_row(key, "" if value is None else str(value))
    return table


def _layers(artifact: Artifact, length: int) -> Table:
    from sparseserve.artifacts import head_map

    if artifact.kind == "seer":
        table = Table("layer", "gates")
        for layer in range(artifact.layers):
            query = artifact.tensors[f"query.{layer}"]
            table.add_row(str(layer), f"{' x '.join(map(str, query.shape))} {str(query.dtype).removeprefix('torch.')}")
        return table
    values, meaning = head_map(artifact, length)
    table = Table("layer", Column(meaning, overflow="fold"), "mean", show_edge=False)
    for layer, row in enumerate(values.tolist()):
        heads = " ".join(f"{value:g}" for value in row) if artifact.kind == "s2" else "".join(map(_bar, row))
        dense = isnan(row[0])
        table.add_row(str(layer), "dense" if dense else heads, "" if dense else f"{sum(row) / len(row):.3f}")
    return table


def _bar(value: float) -> str:
    return BARS[round(min(max(value, 0), 1) * (len(BARS) - 1))]


def _draw(artifact: Artifact, length: int, path: Path) -> None:
    """Write the layer x head map as an image."""
    need("calibrate", "matplotlib")
    from sparseserve.artifacts.drawing import draw_heads

    figure = draw_heads(artifact, length, artifact.model or artifact.source)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "--plot", path, "an image that can be written, such as heads.png", remedy=str(error)
        ) from None
