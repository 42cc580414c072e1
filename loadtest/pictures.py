"""The pictures of a report, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from loadtest.metrics import Sample, kv_bytes
from loadtest.results import Results, SettingResult
from loadtest.statistics import Accuracy, Estimate

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "loadtest"}
GRID: Any = {"color": "#dddddd", "linewidth": 0.6}
COLOURS = ("#1f5fa8", "#d97a1f", "#3d8f4f", "#8a4fa3", "#b5485d", "#50808e", "#8c6d1f", "#444444")
CONTROL = "#c0392b"
RATE = "output_throughput"
MIB = 2**20
REACH = 1.5  # of the largest value: an interval over few runs may be many times as wide, and leaves the picture

Span = tuple[float, float, float]  # a value, its interval from, to


def throughput_against_latency(results: Results) -> str:
    """Output tokens a second against p95 of TTFT and of TPOT, with intervals; a point for every load, named at the
    control's."""
    figure = Figure(figsize=(9.2, 3.7), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("ttft_p95", "tpot_p95"), strict=True):
        for setting, style in _styled(results):
            found = [(cell.load, cell.estimates.get(metric), cell.estimates.get(RATE)) for cell in setting.cells]
            points = [(load, _span(x), _span(y)) for load, x, y in found if x and y]
            _points(axes, [x for _, x, _ in points], [y for *_, y in points], style)
            for load, x, y in points if setting.role == "control" else []:
                place = (x[0], y[0])
                axes.annotate(load, place, xytext=(5, -9), textcoords="offset points", fontsize=7, color=CONTROL)
        _bound(axes, "xy")
        _finish(axes, f"{metric[:4].upper()} p95, ms", "output tokens per second")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return svg(figure)


def goodput(results: Results) -> str:
    """Requests within the objective a second, by load, with intervals."""
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    names = [load.name for load in results.scenario.loads]
    for number, (setting, style) in enumerate(_styled(results)):
        shift = 0.1 * (number - (len(results.settings) - 1) / 2)
        found = [(place, cell.estimates.get("goodput")) for place, cell in enumerate(setting.cells)]
        bars = [(place + shift, _span(bar)) for place, bar in found if bar]
        _points(axes, [(place, place, place) for place, _ in bars], [bar for _, bar in bars], style | {"ls": ""})
    _bound(axes, "y")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    _finish(axes, "load", "requests within the SLO per second")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return svg(figure)


def over_time(results: Results, samples: dict[str, list[Sample]]) -> str | None:
    """KV bytes that rows hold and the share of the KV cache in use, at the last load; `samples` by setting. None
    where no server told either."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    held, used = figure.subplots(1, 2)
    drawn = False
    for setting, style in _styled(results):
        run = samples.get(setting.name, [])
        held_mib = [(s["time"] - run[0]["time"], b / MIB) for s in run if (b := kv_bytes(s)) is not None]
        usage = [(s["time"] - run[0]["time"], 100 * s["kv_usage"]) for s in run if "kv_usage" in s]
        for axes, points in ((held, held_mib), (used, usage)):
            axes.plot([x for x, _ in points], [y for _, y in points], **style | {"marker": ""})
            drawn |= bool(points)
    _finish(held, "seconds", "KV bytes that rows hold, MiB")
    _finish(used, "seconds", "KV cache in use, %")
    figure.legend(*used.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return svg(figure) if drawn else None


def pareto(results: Results) -> str | None:
    """Accuracy against the median time per output token at the highest load, with intervals; None where no accuracy is
    known."""
    load = results.scenario.loads[-1].name
    points = [
        (style, _span(one), _percent(setting.accuracy))
        for setting, style in _styled(results)
        if setting.accuracy is not None and (one := setting.cell(load).estimates.get("tpot_p50"))
    ]
    if not points:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = [(x[0], y[0]) for _, x, y in points]
    front = [(x, y) for x, y in places if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in places)]
    axes.plot(*zip(*sorted(front), strict=True), color="#bbbbbb", linewidth=1, zorder=1)
    for style, x, y in points:
        _points(axes, [x], [y], style | {"ls": ""})
    _bound(axes, "x")
    axes.set_ylim(-5, 108)
    _finish(axes, f"TPOT p50 at {load}, ms", "accuracy, %", zero=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return svg(figure)


def _styled(results: Results) -> list[tuple[SettingResult, dict[str, Any]]]:
    """Settings with their line; the control and its repetition share a colour."""
    styles = [{"color": CONTROL}, {"color": CONTROL, "ls": ":", "markerfacecolor": "white"}]
    for number in range(len(results.settings) - len(styles)):
        styles.append({"color": COLOURS[number % len(COLOURS)], "ls": ("-", "--")[number // len(COLOURS) % 2]})
    return [
        (one, {"ls": "-", "marker": "o", "label": one.name, **style})
        for one, style in zip(results.settings, styles, strict=True)
    ]


def _span(of: Estimate) -> Span:
    """A rate or a latency is never below 0."""
    return of.value, max(0.0, of.low), of.high


def _percent(of: Accuracy) -> Span:
    low, high = of.interval or (of.value, of.value)
    return 100 * of.value, 100 * low, 100 * high


def _points(axes: Axes, x: Sequence[Span], y: Sequence[Span], style: dict[str, Any]) -> None:
    """Points with their intervals; none where nothing was measured."""
    if x:
        (xs, across), (ys, up) = _errors(x), _errors(y)
        pale = (style["color"], 0.45)
        axes.errorbar(xs, ys, up, across, markersize=4, capsize=2, elinewidth=0.8, ecolor=pale, **style)


def _errors(spans: Sequence[Span]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above them."""
    values = [value for value, *_ in spans]
    below = [max(0.0, value - low) for value, low, _ in spans]
    return values, [below, [max(0.0, high - value) for value, _, high in spans]]


def _bound(axes: Axes, directions: str) -> None:
    """From 0 to the intervals' ends, within reach of the values."""
    lines = [one.lines[0] for one in axes.containers if isinstance(one, ErrorbarContainer)]
    for direction in directions:
        highest = max((value for line in lines for value in getattr(line, f"get_{direction}data")()), default=0.0)
        if highest > 0:
            end = min(getattr(axes, f"get_{direction}lim")()[1], REACH * highest)
            axes.set(**{f"{direction}lim": (0, end)})


def _finish(axes: Axes, x: str, y: str, zero: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(**GRID)
    if zero:
        axes.set_ylim(bottom=0)


def svg(figure: Figure) -> str:
    """A picture as text."""
    text = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
