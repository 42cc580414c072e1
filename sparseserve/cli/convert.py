"""`sparseserve convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LENGTH = 32768  # tokens, at which densities are told


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A published file or folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the artifact.")],
    model: Annotated[
        Path | None, typer.Option(metavar="DIR|CONFIG", help="The model's config.json or its folder, to check against.")
    ] = None,
) -> None:
    """Turn a published plan, head map or gate checkpoint into one safetensors file, checked against its model.

    Reads MoA plans, Retrieval_Head scores, DuoAttention and LServe patterns, RazorAttention lists, SeerAttention-R
    decode gates and S2-Attention configurations, recognised by their content.
    """
    from sparseserve.artifacts import headline, load, read_model, save  # imports torch

    artifact = load(source)
    print(f"found   {artifact.source}")
    if model:
        shape = read_model(model)
        artifact = artifact.resolve(shape)
        heads = f"{shape.heads.query_heads} query and {shape.heads.kv_heads} KV heads of {shape.heads.head_dim}"
        print(f"fits    {shape.name}: {shape.layers} layers, {heads}")
    save(artifact, output)
    print(f"wrote   {output}: {headline(artifact, LENGTH)}")
