"""`python -m loadtest`: run, soak, chaos."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from loadtest.scenario import LoadTestError

FLAGGED, REFUSED = 1, 2  # exit codes

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


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

    Writes report.html, results.json and summary.json. The exit code is 1 where something failed, or answers were wrong.
    """
    from loadtest.judge import judge, read_eval
    from loadtest.report import render
    from loadtest.run import LoadTest, measure
    from loadtest.scenario import read_scenario
    from loadtest.setting import setting, settings
    from loadtest.sweep import write_summary

    request = LoadTest(
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
    write_summary(results, out)
    typer.echo(f"{out / 'report.html'}\n{out / 'results.json'}")
    for one in results.settings:
        for problem in one.problems:
            typer.echo(f"flagged: {one.name}: {problem}", err=True)
    raise typer.Exit(FLAGGED if results.flagged else 0)


@app.command(context_settings=PASSED_ON)
def soak(
    ctx: typer.Context,
    model: Model,
    out: Out,
    policy: Annotated[str, typer.Option(metavar="NAME[:KEY=VALUE]...")] = "dense",
    minutes: Annotated[float, typer.Option(min=0, help="How long; a few rounds are made in any case.")] = 10.0,
) -> None:
    """Traffic with clients that go away; memory and pages must not drift. Other options go to `vllm serve`."""
    from loadtest.checks import show
    from loadtest.server import serving
    from loadtest.setting import setting
    from loadtest.soak import soak

    out.mkdir(parents=True, exist_ok=True)
    with serving(setting(policy), model, ctx.args, out / "server.log") as server:
        checks = soak(server, minutes, typer.echo)
    raise typer.Exit(0 if show(f"soak: {policy}, {minutes:g} minutes", checks) else FLAGGED)


@app.command(context_settings=PASSED_ON)
def chaos(
    ctx: typer.Context,
    model: Model,
    out: Out,
    policy: Annotated[str, typer.Option(metavar="NAME[:KEY=VALUE]...")] = "dense",
) -> None:
    """Kill, stop, overflow, go away: each with what must come of it. Other options go to `vllm serve`."""
    from loadtest.chaos import chaos
    from loadtest.checks import show
    from loadtest.setting import setting

    checks = chaos(setting(policy), model, ctx.args, out, typer.echo)
    raise typer.Exit(0 if show(f"chaos: {policy}", checks) else FLAGGED)


def main() -> int:
    """Run the command; a mistake of the user's is a message."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # our servers end with us
    try:
        app()
    except LoadTestError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
