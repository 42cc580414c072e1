"""What is wrong with a kernel must show, and nothing must show where nothing is wrong."""

from __future__ import annotations

import math

import pytest

from tests.helpers.sim_programs import ORDERS, Run, values_of

THREADS = range(64)
RIGHT = {
    "no_barrier": [63 - t for t in THREADS],
    "no_second_barrier": [(t + 2) % 64 for t in THREADS],
    "no_warp_barrier": [t ^ 31 for t in THREADS],
    "no_wait": [63 - t for t in THREADS],
    "short_wait": [6] * 64,
    "uninitialised": [64] * 64,
    "uninitialised_dynamic": [t ^ 1 for t in THREADS],
    "divergent_barrier": [t + 1 for t in THREADS],
    "two_barriers": [t + 1 for t in THREADS],
    "different_operations": [t ^ 1 for t in THREADS],
    "different_masks": [t ^ 1 for t in THREADS],
    "outside_mask": [t ^ 1 for t in THREADS],
    "absent_lane": [t ^ 1 for t in THREADS],
    "exited_lanes": list(THREADS),
    "misaligned": [0] * 64,
    "misaligned_copy": list(THREADS),
    "copy_elsewhere": list(THREADS),
    "out_of_bounds": [0] * 64,
    "out_of_shared": [0] * 64,
    "out_of_dynamic_shared": [0] * 64,
}
POISONED = ["no_barrier", "no_warp_barrier", "no_wait", "short_wait", "uninitialised", "uninitialised_dynamic"]
REPORTED = {
    "divergent_barrier": [
        "is stuck",
        "threads 0-39 in __syncthreads at ",
        "threads 40-63 in __shfl_xor_sync of mask 0xffffffff at ",
    ],
    "two_barriers": ["is stuck", "in __syncthreads at "],
    "different_operations": ["in __shfl_xor_sync of mask 0xffffffff", "in __ballot_sync of mask 0xffffffff"],
    "different_masks": ["in __shfl_xor_sync of mask 0xffffffff", "in __shfl_xor_sync of mask 0xffffff00"],
    "outside_mask": ["__shfl_xor_sync: mask 0x0000ffff is without its lane "],
    "absent_lane": ["thread (8, 0, 0)", "__shfl_xor_sync: lane 9, which it reads, takes no part"],
    "exited_lanes": ["mma: lanes of the warp have exited"],
    "misaligned": ["load_stream16: ", "is not aligned"],
    "misaligned_copy": ["copy_async16: an address is not a multiple of 16"],
    "copy_elsewhere": ["copy_async16: the target is not in shared memory"],
}
OUT_OF_BOUNDS = {
    "out_of_bounds": "heap-buffer-overflow",
    "out_of_shared": "use-after-poison",
    "out_of_dynamic_shared": "use-after-poison",
}


@pytest.mark.parametrize("program", ["mistakes", "checked"])
@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels_pass(run: Run, program: str, order: str) -> None:
    arguments = [word for name in RIGHT for word in (name, "right")]
    assert values_of(run(program, *arguments, order=order)) == RIGHT


@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("order", ORDERS)
def test_what_this_block_did_not_write_is_nan(run: Run, name: str, order: str) -> None:
    done = run("mistakes", name, "right", name, "wrong", order=order, threads=1)
    assert any(map(math.isnan, values_of(done)[name]))


def test_a_race_differs_between_orders(run: Run) -> None:
    results = [values_of(run("mistakes", "no_second_barrier", "wrong", order=order)) for order in ORDERS]
    assert results[0] != results[1]
    assert all(result["no_second_barrier"] != RIGHT["no_second_barrier"] for result in results)


@pytest.mark.parametrize("program", ["mistakes", "checked"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", REPORTED)
def test_reports(run: Run, name: str, order: str, program: str) -> None:
    done = run(program, name, "wrong", "no_barrier", "right", order=order)
    output = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert f"{name} error block (0, 0, 0)" in output
    for part in REPORTED[name]:
        assert part in output
    assert "mistakes.cu:" in output
    assert "no_barrier 63 62 61" in output  # the launch after it


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_address_sanitizer_sees_accesses_out_of_bounds(run: Run, name: str) -> None:
    done = run("checked", name, "wrong")
    assert done.returncode != 0
    assert OUT_OF_BOUNDS[name] in done.stderr.decode()
    assert "mistakes.cu:" in done.stderr.decode()
