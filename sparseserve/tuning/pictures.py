"""The pictures of a tuning report, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparseserve.artifacts import Artifact
from sparseserve.artifacts.drawing import draw_heads
from sparseserve.evaluation.results import SettingResult
from sparseserve.tuning.judge import Judged, pareto

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "sparseserve"}
GRID: Any = {"color": "#dddddd", "linewidth": 0.6}
FRONT, OTHER, BASELINE = "#1f5fa8", "#9aa5b1", "#c0392b"


def pareto_front(judged: Sequence[Judged], cost: Sequence[float], reference: float, axis: str) -> str:
    """Quality kept against a cost. Points bear the numbers 1, 2, ... of `judged`; those that no other one beats are
    blue; the cross is vLLM's own attention, at the cost `reference`."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=axis, ylabel="quality kept against dense, %")
    kept = [100 * (1 - one.loss.value) for one in judged]
    front = pareto(judged, cost)
    line = sorted((x, y) for x, y, on in zip(cost, kept, front, strict=True) if on)
    axes.plot([x for x, _ in line], [y for _, y in line], color=FRONT, linewidth=1, alpha=0.5)
    axes.scatter(cost, kept, c=[FRONT if on else OTHER for on in front], zorder=3)
    axes.scatter([reference], [100], marker="x", color=BASELINE, zorder=3)
    points = [(x, y, str(number)) for number, (x, y) in enumerate(zip(cost, kept, strict=True), 1)]
    for x, y, label in _joined(points, 0.03 * max([*cost, reference])):
        axes.annotate(label, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.grid(**GRID)
    axes.set_ylim(min([*kept, 100.0]) - 6, 108)
    axes.set_xlim(0, 1.08 * max([*cost, reference]))
    return _svg(figure)


def needle_grid(result: SettingResult, task: str) -> str | None:
    """Score of a task by length and depth; None where it was not asked at depths."""
    cells = {(cell.length, cell.depth): cell for cell in result.cells if cell.task == task and cell.depth is not None}
    if not cells:
        return None
    lengths, depths = (
        sorted({length for length, _ in cells}),
        sorted({depth for _, depth in cells if depth is not None}),
    )
    nothing = float("nan")
    scores = [[cells[at, d].score if (at, d) in cells else nothing for at in lengths] for d in depths]
    figure = Figure(figsize=(1.6 + 0.7 * len(lengths), 0.9 + 0.34 * len(depths)), layout="constrained")
    axes = figure.add_subplot(xlabel="context, tokens", ylabel="depth")
    axes.imshow(scores, cmap="RdYlGn", alpha=0.55, vmin=0, vmax=1, aspect="auto", origin="upper")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, line in enumerate(scores):
        for column, score in enumerate(line):
            axes.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=8)
    return _svg(figure)


def recall_by_layer(judged: Sequence[Judged]) -> str | None:
    """Attention mass kept by every layer at the longest length; None where nothing was measured."""
    measured = [one for one in judged if one.recall]
    if not measured:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="attention mass kept")
    for index, one in enumerate(measured):
        recall = one.recall or []
        axes.plot(range(len(recall)), recall, marker="o", markersize=3, linestyle=_dash(index), label=one.name)
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(**GRID)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _svg(figure)


def layer_head_map(artifact: Artifact, length: int) -> str | None:
    """What an artifact says about every head; None for gates, which decide anew at every step."""
    return None if artifact.kind == "seer" else _svg(draw_heads(artifact, length))


def _joined(points: Sequence[tuple[float, float, str]], near: float) -> list[tuple[float, float, str]]:
    """The points with those that lie on one another, as far as a label can tell, made one."""
    joined: list[tuple[float, float, str]] = []
    for x, y, label in points:
        same = next((i for i, (a, b, _) in enumerate(joined) if abs(x - a) <= near and abs(y - b) < 2), None)
        if same is None:
            joined.append((x, y, label))
        else:
            joined[same] = (*joined[same][:2], f"{joined[same][2]}, {label}")
    return joined


def _dash(index: int) -> str:
    """Lines that lie on one another stay visible."""
    return ("-", "--", "-.", ":")[index % 4]


def _svg(figure: Figure) -> str:
    text = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
