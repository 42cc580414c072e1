"""`python -m loadtest`: run, soak, chaos."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from loadtest.scenario import LoadTestError

FLAGGED, REFUSED = 1, 2  # exit codes

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """Load tests of servers with sparse attention."""


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Model = Annotated[str, typer.Option(help="As `vllm serve` takes it; with --url, where the tokenizer is.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="For results, logs and samples.")]


@app.command(context_settings=PASSED_ON)
def run(
    ctx: typer.Context,
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A YAML file, or the name of one that ships.")],
    model: Model,
    policies: Annotated[str, typer.Option(metavar="NAME[:KEY=VALUE]...,...", help="Policies; with --url, aliases.")],
    out: Out,
    baseline: Annotated[str, typer.Option(metavar="POLICY", help="The control; vllm: without the plugin.")] = "dense",
    url: Annotated[str | None, typer.Option(help="A server that runs already, and takes aliases NAME@dense.")] = None,
    eval_: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="RESULTS.json of sparseserve eval, for accuracy.")
    ] = None,
) -> None:
    """Compare policies under load. Options that are not listed go to `vllm serve`.

    Writes results.json and report.html; exit code 1 where a request failed or answers were wrong.
    """
    from loadtest.judge import judge, read_eval
    from loadtest.report import render
    from loadtest.run import Request, measure
    from loadtest.scenario import read_scenario
    from loadtest.setting import setting, settings

    request = Request(
        scenario=read_scenario(scenario),
        model=model,
        control=setting(baseline),
        policies=settings(policies),
        url=url,
        flags=tuple(ctx.args),
        folder=out,
        command=shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
    )
    evaluated = read_eval(eval_) if eval_ else None
    results = judge(request, measure(request, typer.echo), evaluated)
    (out / "results.json").write_text(results.model_dump_json(indent=1) + "\n")
    (out / "report.html").write_text(render(results, out))
    typer.echo(f"{out / 'report.html'}\n{out / 'results.json'}")
    for one in results.flagged:
        typer.echo(f"flagged: {one.name}: {'; '.join(one.problems)}", err=True)
    raise typer.Exit(FLAGGED if results.flagged else 0)


def main() -> int:
    """Run the command; a mistake of the user's is a message."""
    try:
        app()
    except LoadTestError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
