"""`sparseserve calibrate KIND MODEL -o FILE`."""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure a model and write what a policy needs of it.", no_args_is_help=True)
