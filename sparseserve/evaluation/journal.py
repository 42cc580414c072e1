"""What an evaluation has found so far, on disk: a killed one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sparseserve.errors import ConfigError
from sparseserve.files import write_atomically


class Journal:
    """Findings by key, each appended as a line of JSON as soon as it is there."""

    def __init__(self, found: dict[str, Mapping[str, Any]], file: IO[str] | None) -> None:
        self._found, self._file = found, file

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def get(self, key: str) -> Mapping[str, Any]:
        """A finding; empty for one that is not there."""
        return self._found.get(key, {})

    def __len__(self) -> int:
        return len(self._found)

    def add(self, key: str, finding: Mapping[str, Any]) -> None:
        """Keep a finding."""
        self._found[key] = finding
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "found": finding}) + "\n")
            self._file.flush()


@contextmanager
def journal(path: Path | None, asked: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in a file, begun for `asked` (JSON-able); ConfigError if it was begun for something else.

    Without a path nothing is written. A line that a kill cut short is dropped.
    """
    if path is None:
        yield Journal({}, None)
        return
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if whole:
        _check(path, json.loads(whole[0]), asked)
    write_atomically(path, b"".join(whole or [json.dumps(asked).encode() + b"\n"]))
    found = {line["key"]: line["found"] for line in map(json.loads, whole[1:])}
    with path.open("a") as file:
        yield Journal(found, file)


def _check(path: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    other = [key for key in asked if begun.get(key) != asked[key]]
    if other:
        differs = ", ".join(f"{key} = {begun.get(key)}, not {asked[key]}" for key in other)
        remedy = f"run what began it to finish it, delete {path}, or give another --output"
        raise ConfigError("arguments", differs, f"those with which {path} was begun", remedy=remedy)
