"""Work that survives a kill: done chunk by chunk, each kept beside the output until all are there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sparseserve.errors import CalibrationError, Problem
from sparseserve.files import write_atomically

Tensors = dict[str, Tensor]
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class Chunks:
    """The finished chunks of one calibration, in the folder `<output>.partial`.

    `arguments` is everything that the chunks depend on; what other arguments left there is thrown away.
    """

    def __init__(self, output: Path, arguments: dict[str, Any], console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._folder = output.with_name(f"{output.name}.partial")
        self._digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:16]
        if not output.resolve().parent.is_dir():
            raise CalibrationError(Problem("-o", output, "a file in a folder that exists", remedy="make the folder"))

    def run(
        self,
        label: str,
        names: Sequence[str],
        compute: Callable[[str], Tensors],
        note: Callable[[Tensors], str] | None = None,
    ) -> Iterator[Tensors]:
        """`compute` of every name, in order, or what an earlier run left of it; shows a progress bar.

        `note` says in a few words what a chunk came to, beside the bar.
        """
        self._folder.mkdir(exist_ok=True)
        with Progress(*COLUMNS, TimeRemainingColumn(), console=self._console, transient=True) as progress:
            task = progress.add_task(label, total=len(names))
            for name in names:
                tensors = self._once(f"{label}-{name}", partial(compute, name))
                progress.update(task, advance=1, description=f"{label}: {note(tensors)}" if note else label)
                yield tensors

    def load(self, label: str, name: str) -> Tensors:
        """A chunk that `run` has finished."""
        return load_file(self._path(f"{label}-{name}"))

    def clear(self) -> None:
        """Remove the chunks, once their output is written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _once(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        path = self._path(name)
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):
            tensors = compute()
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.isnan().any():
                remedy = "check the model's weights; on float16 try --dtype float32"
                raise CalibrationError(Problem(f"{key} of {name}", "NaN", "numbers", remedy=remedy))
        write_atomically(path, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))
        return tensors

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}-{self._digest}.safetensors".replace("/", "_").replace(" ", "_")
