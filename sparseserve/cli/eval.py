"""`sparseserve eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparseserve.cli.extras import VLLM, need
from sparseserve.cli.numbers import shares, whole_numbers

if TYPE_CHECKING:
    from sparseserve.evaluation.results import AtLength, Results, SettingResult


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `vllm serve` takes it.")],
    policies: Annotated[str, typer.Option(metavar="NAME[:KEY=VALUE]...,...", help="Policies, each with its values.")],
    budgets: Annotated[str, typer.Option(metavar="N,...", help="Budgets in tokens, for policies that have one.")] = "",
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Lengths of prompts in tokens.")] = "2048,8192",
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="Tasks, all without.")] = "",
    depths: Annotated[str, typer.Option(metavar="X,...", help="Where answers stand, 0 to 1.")] = "0.1,0.5,0.9",
    samples: Annotated[int, typer.Option(metavar="N", help="Questions for each task, length and depth.")] = 10,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to measure bits per byte on.")] = None,
    recall: Annotated[
        bool, typer.Option(help="Measure attention recall, in a second server per setting (kv_memory=shared).")
    ] = True,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the questions.")] = 0,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("RESULTS.json"),
) -> None:
    """Compare policies on MODEL: accuracy, bits per byte, attention recall, share of KV read, speed.

    Every setting is served by a server of its own; options that are not listed here go to `vllm serve`. Killed at any
    moment, the same command goes on where it was.
    """
    need("evaluate", "openai", "scipy")
    need(VLLM, "vllm")
    from sparseserve.evaluation.evaluation import Evaluation, settings
    from sparseserve.evaluation.run import evaluate, partial_file
    from sparseserve.files import write_atomically
    from sparseserve.questions.tasks import TASKS

    request = Evaluation(
        model=model,
        settings=settings(policies, whole_numbers("--budgets", budgets) if budgets else []),
        lengths=tuple(whole_numbers("--lengths", lengths)),
        tasks=tuple(tasks.split(",")) if tasks else tuple(TASKS),
        depths=tuple(shares("--depths", depths)),
        samples=samples,
        text=None if text is None else str(text),
        recall=recall,
        seed=seed,
        vllm=tuple(ctx.args),
    )
    with progress_bar() as progress:
        results = evaluate(request, output, progress)
    write_atomically(output, results.model_dump_json(indent=1).encode() + b"\n")
    partial_file(output).unlink()
    show(results, Console())


def show(results: Results, console: Console) -> None:
    """Print a row for every setting and length, and below it the commands that measure the rows again."""
    table = Table("", "setting", "tokens", "share right [95 % interval]", "in decode steps", title=results.model)
    table.show_lines = True
    rows = [(setting, at) for setting in results.settings for at in setting.lengths]
    for number, (setting, at) in enumerate(rows, 1):
        name = "\n".join([setting.policy, *(f"{key}={value}" for key, value in setting.values.items())])
        table.add_row(str(number), name, str(at.length), _scores(setting, at.length, results.seed), _costs(at))
    console.print(table)
    console.print("Cell by cell, with commands, in the results file. The rows again:")
    for number, (_, at) in enumerate(rows, 1):
        console.print(f"{number}: {at.command}", soft_wrap=True, highlight=False, markup=False)


def _scores(setting: SettingResult, length: int, seed: int) -> Table:
    """A line for every task: the mean over depths, with the interval of all answers."""
    from sparseserve.evaluation.intervals import interval
    from sparseserve.questions.tasks import TASKS

    lines = Table.grid(padding=(0, 2))
    for task in dict.fromkeys(cell.task for cell in setting.cells):
        cells = [cell for cell in setting.cells if (cell.task, cell.length) == (task, length)]
        scores = [score for cell in cells for score in cell.scores]
        low, high = interval(scores, TASKS[task].exact, seed)
        lines.add_row(task, f"{mean(scores):.2f}", f"\\[{low:.2f}, {high:.2f}]")
    return lines


def _costs(at: AtLength) -> Table:
    lines = Table.grid(padding=(0, 2))
    if at.density is not None:
        lines.add_row("KV read", f"{at.density:.1%}")
    if at.recall is not None:
        lines.add_row("recall", f"{mean(at.recall):.3f}, lowest layer {min(at.recall):.3f}")
    if at.ms_per_token is not None:
        lines.add_row("ms/token", f"{at.ms_per_token:.1f}, of {at.timed_tokens} tokens")
    if at.bits_per_byte is not None:
        lines.add_row("bits/byte", f"{at.bits_per_byte:.3f}, of {at.scored_bytes} bytes")
    return lines


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, piece: bar.update(task, completed=done, total=total, description=piece)
