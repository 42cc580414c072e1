"""What deploy/compose.yaml says, as compose reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import DEPLOY

FILE = DEPLOY / "compose.yaml"
GPU_FILE = DEPLOY / "compose.gpu.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
VARIABLE = re.compile(r"\$\{(\w+):([?-])([^}]*)\}")


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """What a service mounts of the repository: path in the container -> file or folder."""
    volumes = (volume.split(":") for volume in service.get("volumes", []))
    return {target: FILE.parent / source for source, target, *_ in volumes if source.startswith(".")}
