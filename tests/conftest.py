"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from sparseserve.testing import target
from sparseserve.testing.target import Layout

BESIDE_THE_CHECKOUT = Path(__file__).parents[2] / "shared" / "published"


DEVICES = {"cpu": nullcontext, "simulator": partial(target.simulated, Layout.LBHNC)}
if torch.cuda.is_available():
    DEVICES["cuda"] = partial(target.on_gpu, Layout.LBHNC)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels, the CUDA kernels in the simulator, and on a GPU where there is one."""
    if request.param == "simulator" and not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with DEVICES[request.param]():
        yield request.param


@pytest.fixture(scope="session")
def published() -> Path:
    """Files that authors published; they are not part of the project."""
    folder = Path(os.environ.get("SPARSESERVE_PUBLISHED", BESIDE_THE_CHECKOUT))
    if not folder.is_dir():
        pytest.skip(f"no published files in {folder}; set SPARSESERVE_PUBLISHED to a folder with moa/ and duo/")
    return folder
