"""Arguments and options that the kinds of calibration share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a name on the hub, as transformers loads it.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write; the report is FILE.json.")
]
Lengths = Annotated[str, typer.Option(metavar="N,...", help="Lengths of the prompts in tokens.")]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of each kind.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Draws the prompts.")]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="Text to measure on, instead of CPython's own.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="Where to compute; CUDA where there is one.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="What to compute in; float32 on the CPU, as stored elsewhere."),
]
