"""`sparseserve calibrate KIND MODEL -o FILE`."""

from __future__ import annotations

import typer

from sparseserve.cli.calibrate import moa, retrieval_heads, seer, tidal

app = typer.Typer(help="Measure a model and write what a policy needs of it.", no_args_is_help=True)
app.command("moa")(moa.moa)
app.command("retrieval-heads")(retrieval_heads.retrieval_heads)
app.command("seer")(seer.seer)
app.command("tidal")(tidal.tidal)
