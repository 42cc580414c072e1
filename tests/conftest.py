"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from sparseserve.testing import target
from sparseserve.testing.target import Layout

BESIDE_THE_CHECKOUT = Path(__file__).parents[2] / "shared" / "published"


@pytest.fixture(params=["cpu", "simulator"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels, or the CUDA kernels in the simulator."""
    if request.param == "simulator" and not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with target.simulated(Layout.LBHNC) if request.param == "simulator" else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def published() -> Path:
    """Files that authors published; they are not part of the project."""
    folder = Path(os.environ.get("SPARSESERVE_PUBLISHED", BESIDE_THE_CHECKOUT))
    if not folder.is_dir():
        pytest.skip(f"no published files in {folder}; set SPARSESERVE_PUBLISHED to a folder with moa/ and duo/")
    return folder
