"""Arguments and options that the kinds of calibration share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparseserve.errors import ConfigError

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


def whole_numbers(key: str, text: str, least: int = 1) -> list[int]:
    """The numbers of an option such as --lengths 2048,8192; ConfigError for anything else."""
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(numbers) < least:
        raise ConfigError(key, text, f"whole numbers from {least} on, for example 4096,32768")
    return numbers


def shares(key: str, text: str) -> list[float]:
    """The numbers from 0 to 1 of an option such as --depths 0.1,0.5; ConfigError for anything else."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 1 for number in numbers):
        raise ConfigError(key, text, "numbers from 0 to 1, for example 0.1,0.5")
    return numbers
