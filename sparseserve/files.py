"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from sparseserve.errors import FileError, Problem


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file such that a kill or a full disk leaves the old one, or none; raises FileError."""
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        remedy = f"check the path, its permissions and the room on the disk ({error.strerror})"
        raise FileError(Problem("file", path, "a file that can be written", remedy=remedy)) from None
