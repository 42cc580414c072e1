"""`sparseserve calibrate moa`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from sparseserve.cli.calibrate import options
from sparseserve.cli.extras import need
from sparseserve.cli.numbers import shares, whole_numbers


def moa(
    model: options.Model,
    output: options.Output,
    lengths: options.Lengths = "2048,4096,8192",
    validate_length: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length at which the plans are compared, another than those.")
    ] = 12288,
    density: Annotated[
        str, typer.Option(metavar="X,...", help="Most of the tokens that the heads read: one share, or one a length.")
    ] = "0.5",
    samples: options.Samples = 4,
    seed: options.Seed = 0,
    text: options.Text = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Find the windows that lose the least within a density, and write them as a plan for `--policy moa`.

    Measures on the model's own answers to needle questions and to text how much the loss depends on every token,
    chooses a window for every KV head by an integer program, and compares the best plans at another length with the
    uniform window of the same density.
    """
    need("calibrate", "transformers", "scipy")
    goal_lengths, densities = whole_numbers("--lengths", lengths), shares("--density", density)
    from sparseserve.calibration.moa.answers import Draw
    from sparseserve.calibration.moa.calibrate import Goal, calibrate  # imports torch and transformers
    from sparseserve.calibration.report import write_report
    from sparseserve.calibration.subject import load

    subject = load(model, device, dtype)
    results = calibrate(subject, Goal(goal_lengths, validate_length, densities), Draw(samples, seed, text), output)
    told = {
        "lengths": goal_lengths,
        "validate_length": validate_length,
        "density": densities,
        "samples": samples,
        "seed": seed,
        "text": text,
        "device": device,
        "dtype": dtype,
    }
    report = write_report(output, "moa", subject, told, results)
    Console().print(_table(results, validate_length))
    print(f"wrote {output} and {report}")


def _table(results: dict[str, Any], length: int) -> Table:
    table = Table(
        Column("plan", overflow="fold"), f"read at {length}", "loss", "on needles", "on text", "needles found"
    )
    named = [(plan["file"], plan) for plan in results["plans"]]
    for name, plan in [*named, ("uniform window", results["uniform"]), ("dense", results["dense"])]:
        read = plan["density"][length]["per_kv_head"] if "density" in plan else 1.0
        outcome = plan["validation"]
        losses = (f"{outcome[key]:.4g}" for key in ("loss", "needle_loss", "text_loss"))
        table.add_row(name, f"{read:.3f}", *losses, f"{outcome['needle_accuracy']:.0%}")
    return table
