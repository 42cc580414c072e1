from collections.abc import Iterator

import pytest

from sparseserve import ops


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine."""
    best = ops.isa()
    if not ops.use_isa(request.param):
        pytest.skip(f"this machine lacks {request.param}")
    yield request.param
    ops.use_isa(best)
