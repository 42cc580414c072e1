"""The pieces of an evaluation: what is measured at once and kept at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sparseserve.evaluation.evaluation import Evaluation, Setting
from sparseserve.questions.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Piece:
    """Some questions, a text or the recall under a setting at one length."""

    kind: Literal["cell", "text", "recall"]
    setting: Setting
    length: int  # tokens
    task: str = ""
    depth: float | None = None

    def __str__(self) -> str:
        words = [self.kind, self.task, f"{self.length} tokens", "" if self.depth is None else f"at {self.depth:g}"]
        return f"{self.setting}: {' '.join(filter(None, words))}"

    @property
    def key(self) -> str:
        """In a journal: what is measured, and with which bytes of an artifact."""
        artifact = self.setting.values().get("artifact")
        return str(self) if artifact is None else f"{self}, artifact {_sha256(Path(artifact))}"

    @property
    def served(self) -> Setting:
        """What the server must run; measuring recall costs speed, so it gets a server of its own.

        Recall is against all tokens of a row, which heads that free pages do not have.
        """
        if self.kind != "recall":
            return self.setting
        setting = self.setting.with_pair("kv_memory=shared") if self.setting.load().frees_pages else self.setting
        return setting.with_pair("recall_sample=1")


def pieces(request: Evaluation) -> Iterator[Piece]:
    """All pieces, those of one server in a row."""
    for setting in request.settings:
        for length in request.lengths:
            for task, depth in cells(request):
                yield Piece("cell", setting, length, task, depth)
            if request.text is not None:
                yield Piece("text", setting, length)
        if request.recall:
            yield from (Piece("recall", setting, length) for length in request.lengths)


def cells(request: Evaluation) -> Iterator[tuple[str, float | None]]:
    """Tasks, each at every depth where it has one."""
    for task in request.tasks:
        yield from ((task, depth) for depth in (request.depths if TASKS[task].placed else (None,)))


def _sha256(artifact: Path) -> str:
    """Of a file and the config.json beside it, or of all that is in a folder."""
    files = artifact.rglob("*") if artifact.is_dir() else (artifact, artifact.with_name("config.json"))
    digest = hashlib.sha256()
    for file in sorted(filter(Path.is_file, files)):
        state = file.stat()
        digest.update(_sha256_of_file(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


@cache
def _sha256_of_file(file: Path, size: int, changed: int) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
