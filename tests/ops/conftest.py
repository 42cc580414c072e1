from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from sparseserve import ops
from sparseserve.testing import target
from sparseserve.testing.target import Layout

LAYOUTS = Layout.LBHNC, Layout.LBNHC
CUDA = {f"simulator-{layout.value}": partial(target.simulated, layout) for layout in LAYOUTS}
if torch.cuda.is_available():
    CUDA |= {f"cuda-{layout.value}": partial(target.on_gpu, layout) for layout in LAYOUTS}


CPU = ["avx512_bf16", "avx512", "avx2", "portable"]
SLOW = {"avx512", "simulator-LBNHC"}  # between what `make test` runs


def marked(names: Iterable[str]) -> list[object]:
    """The names as parameters, those that `make test-slow` adds marked so."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.fixture(params=marked(CPU))
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=marked([*CPU, *CUDA]))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, and the CUDA kernels on both layouts of vLLM's cache.

    They run in the simulator, and on a GPU where there is one.
    """
    with using(request.param):
        yield request.param


@contextmanager
def using(name: str) -> Iterator[None]:
    if name in CUDA:
        if name.startswith("simulator") and not target.has_simulator():
            pytest.skip(target.NO_SIMULATOR)
        with CUDA[name]():
            yield
        return
    best = ops.isa()
    if not ops.use_isa(name):
        pytest.skip(f"this machine lacks {name}")
    yield
    ops.use_isa(best)
