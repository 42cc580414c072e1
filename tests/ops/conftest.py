from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sparseserve import ops
from sparseserve.testing import target
from sparseserve.testing.target import Layout

SIMULATED = {"simulator-LBHNC": Layout.LBHNC, "simulator-LBNHC": Layout.LBNHC}


CPU = ["avx512_bf16", "avx512", "avx2", "portable"]


@pytest.fixture(params=CPU)
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=[*CPU, *SIMULATED])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, and the CUDA kernels in the simulator on both layouts of vLLM's cache."""
    with using(request.param):
        yield request.param


@contextmanager
def using(name: str) -> Iterator[None]:
    if name in SIMULATED:
        if not target.has_simulator():
            pytest.skip(target.NO_SIMULATOR)
        with target.simulated(SIMULATED[name]):
            yield
        return
    best = ops.isa()
    if not ops.use_isa(name):
        pytest.skip(f"this machine lacks {name}")
    yield
    ops.use_isa(best)
