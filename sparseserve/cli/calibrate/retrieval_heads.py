"""`sparseserve calibrate retrieval-heads`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from sparseserve.cli.calibrate import options
from sparseserve.cli.extras import need
from sparseserve.cli.numbers import shares, whole_numbers

if TYPE_CHECKING:
    from sparseserve.calibration.retrieval.calibrate import HeadScores

OTHERS = 6  # heads that are printed beside the retrieval heads


def retrieval_heads(
    model: options.Model,
    output: options.Output,
    lengths: options.Lengths = "2048,4096",
    depths: Annotated[
        str, typer.Option(metavar="X,...", help="Where the needles lie, 0 to 1.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    samples: options.Samples = 1,
    method: Annotated[
        Literal["copy", "induction"], typer.Option(help="Whose scores FILE holds; both are measured.")
    ] = "copy",
    seed: options.Seed = 0,
    text: options.Text = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Find the heads that retrieve, for --policy retrieval.

    copy: needles that the model answers, for each head the share of their tokens that it copies (Retrieval_Head).
    induction: random tokens that come again, how often a head looks at the earlier occurrence (RazorAttention).
    """
    need("calibrate", "transformers", "scipy")
    from sparseserve.artifacts import save
    from sparseserve.calibration.chunks import Chunks
    from sparseserve.calibration.report import write_report
    from sparseserve.calibration.retrieval.calibrate import artifact, measure, results
    from sparseserve.calibration.samples import text_sha256
    from sparseserve.calibration.subject import load

    tokens, places = whole_numbers("--lengths", lengths), shares("--depths", depths)
    subject = load(model, device, dtype)
    chunks = Chunks(output, subject.identity | {"seed": seed, "text": text_sha256(text)})
    scores = measure(subject, chunks, tokens, places, samples, seed, text)
    heads = artifact(scores, subject, method)
    save(heads, output)
    told = {"lengths": tokens, "depths": places, "samples": samples, "method": method, "seed": seed, "text": text}
    found = results(scores, subject.shape.heads.kv_heads)
    report = write_report(output, "retrieval-heads", subject, told | {"device": device, "dtype": dtype}, found)
    chunks.clear()
    Console().print(_table(scores, found, subject.shape.heads.kv_heads))
    _say(found)
    print(f"wrote {output} ({heads.source}) and {report}")
    print(f"serve it: sparseserve serve {model} --policy retrieval --set artifact={output}")


def _table(scores: HeadScores, found: dict[str, Any], kv_heads: int) -> Table:
    """The retrieval heads of both methods, and the `OTHERS` that come closest."""
    import torch

    from sparseserve.calibration.retrieval.calibrate import columns

    methods: dict[tuple[int, int], list[str]] = {}
    for method, heads in found["retrieval_heads"].items():
        for layer, head in heads:
            methods.setdefault((layer, head), []).append(method)
    measured = columns(scores, kv_heads)
    best = torch.stack([ours for ours, _ in measured.values()]).sum(0).flatten().argsort(descending=True, stable=True)
    order = sorted((divmod(index, kv_heads) for index in best.tolist()), key=lambda head: head not in methods)
    table = Table("layer", "KV head", *measured, "by", title="scores, in brackets as published")
    for head in order[: len(methods) + OTHERS]:
        cells = [f"{float(ours[head]):.2f} ({float(published[head]):.2f})" for ours, published in measured.values()]
        table.add_row(*map(str, head), *cells, ", ".join(methods.get(head, [])))
    return table


def _say(found: dict[str, Any]) -> None:
    answered = ", ".join(f"{row['right']} of {row['asked']} at {row['length']}" for row in found["questions"])
    print(f"needles answered right: {answered} tokens; a retrieval head is one from a score of {found['threshold']} on")
    if agreement := found["agreement"]:
        correlation = agreement["rank_correlation"]
        ranks = "" if correlation is None else f"rank correlation {correlation:.2f}, "
        print(f"the methods agree: {ranks}{agreement['overlap']:.0%} of the heads that either chose")
