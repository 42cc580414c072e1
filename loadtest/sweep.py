"""All runs as `vllm bench sweep` leaves them, for its plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadtest.results import Results


def write_summary(results: Results, folder: Path) -> None:
    """summary.json: what `vllm bench serve` wrote of every run but its requests, with `policy`, `load`, `run_number`.

    `vllm bench sweep plot` reads it.
    """
    runs = [
        _summed_up(folder / file) | {"policy": setting.name, "load": cell.load, "run_number": number}
        for setting in results.settings
        for cell in setting.cells
        for number, file in enumerate(cell.files)
    ]
    (folder / "summary.json").write_text(json.dumps(runs, indent=1) + "\n")


def _summed_up(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return {key: value for key, value in content.items() if not isinstance(value, list | dict)}
