"""The HTML report: one file, with its pictures and, beside every number, the command that measures it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loadtest import pictures
from loadtest.answers import RIGHT
from loadtest.metrics import read_samples
from loadtest.results import Results, SettingResult
from loadtest.statistics import LATENCIES, Accuracy, Comparison, Estimate, verdict

HEADLINES = {
    "ttft_p50": "first token",
    "tpot_p50": "time per token",
    "output_throughput": "throughput",
    "goodput": "requests within the SLO",
}


def render(results: Results, folder: Path) -> str:
    """The report as HTML; `folder` holds the files of the runs."""
    templates = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(templates), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"estimate": _estimate, "accuracy": _accuracy, "share": _share, "mib": _mib}
    last = results.scenario.loads[-1].name
    samples = {
        one.name: read_samples((folder / file).with_suffix(".metrics.jsonl"))
        for one in results.settings
        for file in one.cell(last).files[-1:]
    }
    return environment.get_template("report.html.j2").render(
        results=results,
        verdicts={one.name: verdicts(one) for one in results.settings if one.role == "policy"},
        right=RIGHT[results.scenario.answers],
        latencies=LATENCIES,
        pictures=pictures,
        samples=samples,
    )


def verdicts(setting: SettingResult) -> list[str]:
    """A sentence for each headline metric."""
    return [
        _sentence(title, [one for one in setting.comparisons if one.metric == metric])
        for metric, title in HEADLINES.items()
    ]


def _sentence(title: str, comparisons: Sequence[Comparison]) -> str:
    ratios = ", ".join(
        f"{one.load} {one.ratio:.2f}x (noise {1 / one.band:.2f} to {one.band:.2f})"
        for one in comparisons
        if one.ratio is not None and one.band is not None
    )
    return f"{title}: {verdict(comparisons)}" + (f"; against the control {ratios}" if ratios else "")


def _estimate(one: Estimate | None) -> Markup:
    """With as many digits as its size asks for; a rate or a latency is never below 0."""
    if one is None:
        return Markup()
    digits = 0 if one.value >= 100 else 1 if one.value >= 10 else 2
    interval = f"[{max(0.0, one.low):.{digits}f}, {one.high:.{digits}f}]"
    return Markup("{}<small>{}</small>").format(f"{one.value:.{digits}f}", interval)


def _accuracy(one: Accuracy) -> str:
    return _share(one.value) + (" [{}, {}]".format(*map(_share, one.interval)) if one.interval else "")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / pictures.MIB:.1f}"
