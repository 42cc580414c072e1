"""`sparseserve tune`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from sparseserve.cli.extras import VLLM, need
from sparseserve.cli.numbers import shares, whole_numbers
from sparseserve.errors import ConfigError

if TYPE_CHECKING:
    from sparseserve.tuning.judge import Judged
    from sparseserve.tuning.report import Tuning


def tune(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `vllm serve` takes it.")],
    max_loss: Annotated[str, typer.Option(metavar="1%", help="Quality that may be lost against dense attention.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Policy file to write; the report is FILE.html.")] = Path(
        "policy.yaml"
    ),
    objective: Annotated[
        Literal["latency", "memory"], typer.Option(help="Least time per token, or least stored, then read, per token.")
    ] = "latency",
    policies: Annotated[
        str,
        typer.Option(
            metavar="NAME[:KEY=VALUE]...,...",
            help="Candidates, each with its values and artifacts; without, all that suit any model as they are.",
        ),
    ] = "",
    budgets: Annotated[
        str, typer.Option(metavar="N,...", help="Budgets in tokens; powers of two up to half of the longest length.")
    ] = "",
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Lengths of prompts in tokens.")] = "4096,16384",
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="Tasks of `sparseserve eval`, all without.")] = "",
    depths: Annotated[str, typer.Option(metavar="X,...", help="Where answers stand, 0 to 1.")] = "0.1,0.5,0.9",
    samples: Annotated[int, typer.Option(metavar="N", help="Questions for each task, length and depth.")] = 10,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text whose bits per byte count, too.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the questions.")] = 0,
) -> None:
    """Measure policies and budgets on MODEL through its server, and write the policy file of the best within a loss.

    Loss is against dense attention, on what that can answer. Only what was measured is recommended: whole, right to
    within --max-loss, and better than vLLM's own attention beyond the noise of the machine. Options that are not
    listed here go to `vllm serve`. Killed at any moment, the same command goes on where it was.
    """
    _need_packages()
    from sparseserve.cli.eval import progress_bar
    from sparseserve.evaluation.evaluation import Evaluation, settings
    from sparseserve.questions.tasks import TASKS
    from sparseserve.tuning.run import Asked, tune
    from sparseserve.tuning.search import candidates, with_budgets

    tokens = tuple(whole_numbers("--lengths", lengths))
    asked_for = settings(policies or candidates(), whole_numbers("--budgets", budgets) if budgets else [])
    request = Evaluation(
        model=model,
        settings=asked_for if budgets else with_budgets(asked_for, tokens),
        lengths=tokens,
        tasks=tuple(tasks.split(",")) if tasks else tuple(TASKS),
        depths=tuple(shares("--depths", depths)),
        samples=samples,
        text=None if text is None else str(text),
        seed=seed,
        vllm=tuple(ctx.args),
    )
    request.check()
    asked = Asked(request, objective, _share(max_loss), shlex.join(["sparseserve", *sys.argv[1:]]))
    with progress_bar() as progress:
        tuning = tune(asked, folder := output.with_name(f"{output.name}.partial"), progress)
    _write(tuning, output)  # without a policy to recommend, what was measured stays for another --max-loss
    shutil.rmtree(folder)
    print(f"wrote {output}: serve it with `sparseserve serve {shlex.quote(model)} --policy {output}`")


def _need_packages() -> None:
    need("calibrate", "scipy", "matplotlib", "jinja2")
    need("evaluate", "openai")
    need(VLLM, "vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to stdout


def _write(tuning: Tuning, output: Path) -> None:
    """The report, and the policy that it recommends."""
    from sparseserve.tuning.report import write_report
    from sparseserve.tuning.run import write_policy

    report = output.with_name(f"{output.name}.html")
    write_report(tuning, report)
    show(tuning, Console())
    print(f"wrote {report}")
    write_policy(tuning, output)


def _share(text: str) -> float:
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError("--max-loss", text, "a share such as 1% or 0.01", remedy="give for example --max-loss 1%")
    return share


def show(tuning: Tuning, console: Console) -> None:
    """Print a row for every setting and what is recommended."""
    from sparseserve.tuning.report import OWN

    columns = ["loss", "worse", "ms/token", "faster", "KV read", "recall"]
    table = Table(Column("setting", overflow="fold"), *(Column(name, justify="right") for name in columns))
    table.title = f"{tuning.model}: loss against dense attention, speed against vLLM's own"
    table.add_row(OWN, *_numbers(tuning.baseline))
    for one in tuning.judged:
        table.add_row(one.name, *_numbers(one), style="bold" if one is tuning.verdict.chosen else None)
    table.add_row(f"{OWN}, again", *_numbers(tuning.again))
    console.print(table)
    if any(one.recall_shared for one in tuning.judged):
        console.print("recall (shared): measured with kv_memory=shared, where heads keep what recall is against")
    for name, why in tuning.untried.items():
        console.print(f"not measured: {name}: {why}", highlight=False, markup=False)
    chosen = tuning.verdict.chosen
    console.print(f"{chosen.name if chosen else 'no recommendation'}: {tuning.verdict.reason}", highlight=False)
    if chosen and chosen.loss.questions:
        lost = chosen.loss
        worse = f"{lost.worse} of {lost.questions} questions answered worse than by dense attention"
        console.print(f"{worse}; with 95 % confidence at most {lost.bound:.1%} of such questions are", highlight=False)


def _numbers(one: Judged) -> list[str]:
    return [
        f"{one.loss.value:.1%}",
        f"{one.loss.worse} of {one.loss.questions}",
        "" if one.ms_per_token is None else f"{one.ms_per_token:.1f}",
        "" if one.speedup is None else f"{one.speedup:.2f}x",
        f"{one.density:.1%}",
        "" if one.recall is None else f"{min(one.recall):.3f}{' (shared)' if one.recall_shared else ''}",
    ]
