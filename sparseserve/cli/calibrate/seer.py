"""`sparseserve calibrate seer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseserve.cli.calibrate import options
from sparseserve.cli.extras import need
from sparseserve.cli.numbers import whole_numbers

if TYPE_CHECKING:
    from sparseserve.artifacts import Artifact
    from sparseserve.calibration.subject import Subject

CHOOSERS = {"gate": "gate", "block_max": "its target", "mean_key": "mean key", "random": "random"}


def seer(
    model: options.Model,
    output: options.Output,
    lengths: options.Lengths = "2048,4096",
    samples: options.Samples = 24,
    held_out: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of each length to measure on.")] = 4,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Queries of a prompt, from its last half.")] = 256,
    steps: Annotated[int, typer.Option(min=16, metavar="N", help="Steps of training, two prompts each.")] = 400,
    learning_rate: Annotated[float, typer.Option(min=1e-6, metavar="X", help="The largest of AdamW.")] = 5e-3,
    block_size: Annotated[int, typer.Option(min=16, metavar="N", help="Tokens of a block, a multiple of 16.")] = 64,
    gate_dim: Annotated[int, typer.Option(min=16, metavar="N", help="Dim of the gates, a multiple of 16.")] = 128,
    no_qk_norm: Annotated[bool, typer.Option("--no-qk-norm", help="Without RMS norms in the gates.")] = False,
    no_rope: Annotated[bool, typer.Option("--no-rope", help="Without rotation in the gates.")] = False,
    seed: options.Seed = 0,
    text: options.Text = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Distil decode gates from the dense model, for --policy seer (SeerAttention-R).

    Writes FILE, and the same gates as their authors publish them to a folder beside it. Measures on held-out text how
    much attention mass the blocks hold that the gates choose, of what the heaviest eighth of the blocks holds.
    """
    need("calibrate", "transformers")
    from sparseserve.calibration.chunks import Chunks
    from sparseserve.calibration.report import write_report
    from sparseserve.calibration.seer.data import Documents
    from sparseserve.calibration.seer.distil import Recipe, distil, results
    from sparseserve.calibration.seer.files import artifact
    from sparseserve.calibration.subject import load

    documents = Documents(whole_numbers("--lengths", lengths), samples, held_out, rows, block_size, seed, text)
    recipe = Recipe(steps, learning_rate, gate_dim, not no_qk_norm, not no_rope)
    subject = load(model, device, dtype)
    chunks = Chunks(output, subject.identity | documents.arguments | recipe.arguments)
    distilled = distil(subject, chunks, documents, recipe)
    folder = _save(artifact(distilled.gates, subject, documents.block, recipe.rope), subject, output)
    told = {
        "lengths": documents.lengths,
        "samples": samples,
        "held_out": held_out,
        "rows": rows,
        "steps": steps,
        "learning_rate": learning_rate,
        "block_size": block_size,
        "gate_dim": gate_dim,
        "no_qk_norm": no_qk_norm,
        "no_rope": no_rope,
        "seed": seed,
        "text": text,
    }
    found = results(distilled)
    report = write_report(output, "seer", subject, told | {"device": device, "dtype": dtype}, found)
    chunks.clear()
    _print(found)
    print(f"wrote {output}, {folder} and {report}")
    print(f"serve it: sparseserve serve {model} --policy seer --set artifact={output}")


def _save(gates: Artifact, subject: Subject, output: Path) -> Path:
    """Write the gates, and to the folder that is returned, as they are published."""
    from sparseserve.artifacts import save
    from sparseserve.calibration.seer.files import publish

    folder = output.with_name(f"{output.stem}-published")
    save(gates, output)
    publish(gates, subject, folder)
    return folder


def _print(found: dict[str, Any]) -> None:
    """Per layer: the loss, the recall of every way to choose blocks, the attention that is at stake."""
    loss, recall = found["loss"], found["recall"]
    table = Table("layer", "held-out loss", *CHOOSERS.values(), "oracle's mass", title="recall at 12.5 % density")
    for layer, curve in enumerate(loss["held_out_layers"]):
        cells = [f"{recall[name][layer]:.3f}" for name in CHOOSERS]
        table.add_row(str(layer), f"{curve[0]:.2f} -> {curve[-1]:.2f}", *cells, f"{found['oracle_mass'][layer]:.3f}")
    means = [f"{sum(recall[name]) / len(recall[name]):.3f}" for name in CHOOSERS]
    table.add_row("mean", f"{loss['held_out'][0]:.2f} -> {loss['held_out'][-1]:.2f} (sum)", *means, "")
    Console().print(table)
    print("recall: attention mass of the chosen blocks over that of the heaviest ones (the oracle, 1 by definition);")
    print("oracle's mass: share of all attention that those hold; blocks before the query's own, which is always read")
