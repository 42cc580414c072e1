"""What a calibration measured, beside its artifact: all numbers and everything that is needed to get them again."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparseserve.calibration.subject import Subject
from sparseserve.files import write_atomically

PACKAGES = ("sparseserve", "torch", "transformers")


def write_report(
    output: Path, kind: str, subject: Subject, options: Mapping[str, Any], results: Mapping[str, Any]
) -> Path:
    """Write `<output>.json` and return its path.

    `options` are those of `sparseserve calibrate KIND`, by the names of its parameters, without MODEL and -o; `results`
    are JSON-able. ValueError for NaN or infinity; FileError if it cannot be written.
    """
    path = output.with_name(f"{output.name}.json")
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    report = {
        "kind": kind,
        "command": rerun(kind, subject.shape.name, output, plain),
        "model": subject.shape.name,
        "config_sha256": subject.shape.config_sha256,
        "device": str(subject.device),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "options": plain,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": results,
    }
    write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    return path


def rerun(kind: str, model: str, output: Path, options: Mapping[str, Any]) -> str:
    """The command with every option spelt out; lists as `1,2`, switches without a value, None left out."""
    words = ["sparseserve", "calibrate", kind, model, "--output", str(output)]
    for key, value in options.items():
        if value is None or value is False:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [text])]
    return shlex.join(words)
