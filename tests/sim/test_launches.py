"""What a launch tells the host."""

from __future__ import annotations

import pytest

from tests.helpers.sim_programs import ORDERS, Run


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_launches(run: Run, order: str, threads: int) -> None:
    done = run("launches", order=order, threads=threads)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    first = {"forward": "1", "backward": "1024"}.get(order)
    assert first is None or f"allowed: {first}" in lines
    for line in (
        "too much shared memory: invalid argument, then no error",
        "too many threads: invalid configuration argument, then no error",
        "no blocks: invalid configuration argument, then no error",
        "too many blocks: invalid configuration argument, then no error",
        "backward known: 1",
        "backward: 100",
        "forward known: 1",
        "forward: 1",
        "sideways known: 0",
        "sideways: 1",
    ):
        assert line in lines
    assert any(line.startswith("as much as asked for: ") and line[-1].isdigit() for line in lines)
    assert sum(line.startswith("bad block: block (17, 0, 0) is stuck") for line in lines) == 3
    assert sum(line.startswith("  threads 0-2 in __syncthreads at ") for line in lines) == 3
    assert sum(line.startswith("  threads 3 in __syncwarp of mask 0x000000ff at ") for line in lines) == 3
    assert lines.count("  28 threads have exited") == 3
    assert lines.count(f"good blocks: {17 * 32}") == 3


def test_unknown_order(run: Run) -> None:
    done = run("grid", order="sideways")
    assert done.returncode != 0
    assert "SPARSESERVE_SIM_ORDER must be forward, backward or random" in done.stderr.decode()
