"""`sparseserve calibrate tidal`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from sparseserve.cli.calibrate import options
from sparseserve.cli.extras import need
from sparseserve.cli.numbers import whole_numbers


def tidal(
    model: options.Model,
    output: options.Output,
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="How many reselection layers to choose.")] = 1,
    budget: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="budget_tokens of the policy.")] = 1024,
    select_layer: Annotated[int, typer.Option(min=0, metavar="LAYER", help="The first selection layer.")] = 2,
    scope: Annotated[
        Literal["kv_head", "query_head", "all_heads"], typer.Option(help="Heads that share a selection.")
    ] = "kv_head",
    lengths: options.Lengths = "2048,4096",
    samples: options.Samples = 4,
    seed: options.Seed = 0,
    text: options.Text = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Find the layer at which --policy tidal should choose its tokens again, and write a policy file.

    Every layer chooses tokens by attention mass; measured is what the layers behind it keep with them, of the mass of
    text and of what answers put on a needle. The layers that keep most in all are written.
    """
    need("calibrate", "transformers")
    from sparseserve.calibration.chunks import Chunks
    from sparseserve.calibration.report import write_report
    from sparseserve.calibration.samples import text_sha256
    from sparseserve.calibration.subject import load
    from sparseserve.calibration.tidal import calibrate as calibration
    from sparseserve.calibration.tidal.selection import best_layers
    from sparseserve.files import write_atomically
    from sparseserve.policies import Tidal

    tokens = whole_numbers("--lengths", lengths)
    policy = Tidal.model_validate({"select_layer": select_layer, "budget_tokens": budget, "scope": scope})
    subject = load(model, device, dtype)
    calibration.check_layers(subject, select_layer, layers)
    used = {"seed": seed, "text": text_sha256(text), "samples": samples, "budget": budget, "scope": scope}
    chunks = Chunks(output, subject.identity | used)
    curves = calibration.measure(subject, chunks, policy, tokens, samples, seed, text)
    chosen = best_layers(curves, select_layer, layers)
    content = calibration.policy_file(model, policy.model_copy(update={"reselect_layer": chosen}))
    write_atomically(output, content.encode())
    found = calibration.results(curves, select_layer, chosen)
    told = {"layers": layers, "select_layer": select_layer, "lengths": tokens, "device": device, "dtype": dtype}
    report = write_report(output, "tidal", subject, told | used | {"text": text}, found)
    chunks.clear()
    Console().print(_table(found))
    print(found["why"])
    print(f"wrote {output} and {report}\n{content}serve it: sparseserve serve {model} --policy {output}")


def _table(found: dict[str, Any]) -> Table:
    """What is kept by each candidate as the only layer that chooses again."""
    title = "attention kept with a second choice at each layer, the first row without one"
    table = Table("layer", "all: text", "all: needle", "layers after it: mean", "minimum", "", title=title)
    for row in found["candidates"]:
        behind = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("mean", "minimum")]
        mark = "chosen" if row["layer"] in found["reselect_layer"] else ""
        table.add_row(str(row["layer"]), f"{row['text_kept']:.3f}", f"{row['needle_kept']:.3f}", *behind, mark)
    return table
