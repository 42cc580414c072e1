"""What tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE_THE_CHECKOUT = Path(__file__).parents[2] / "shared" / "published"


@pytest.fixture(scope="session")
def published() -> Path:
    """Files that authors published; they are not part of the project."""
    folder = Path(os.environ.get("SPARSESERVE_PUBLISHED", BESIDE_THE_CHECKOUT))
    if not folder.is_dir():
        pytest.skip(f"no published files in {folder}; set SPARSESERVE_PUBLISHED to a folder with moa/ and duo/")
    return folder
