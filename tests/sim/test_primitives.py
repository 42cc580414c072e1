"""CUDA's functions in the simulator against their definitions, in every order of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.sim_programs import ORDERS, Run, values_of

LANES = range(32)
VALUES = [(i * 37 + 11) % 64 for i in LANES]


def shuffled(source: Callable[[int], int], value: Callable[[int], float] = lambda v: v) -> list[float]:
    return [value(VALUES[source(lane)]) for lane in LANES]


def bits(lanes: range, condition: Callable[[int], bool] = lambda v: v > 20) -> int:
    return sum(condition(VALUES[lane]) << lane for lane in lanes)


SHUFFLES = {
    "shfl 5": shuffled(lambda lane: 5),
    "shfl own": shuffled(lambda lane: (lane * 7 + 3) % 32),
    "shfl 37": shuffled(lambda lane: 5),
    "shfl 3 of 8": shuffled(lambda lane: lane // 8 * 8 + 3),
    "shfl 13 of 8": shuffled(lambda lane: lane // 8 * 8 + 5),
    "up 3": shuffled(lambda lane: lane - 3 if lane >= 3 else lane),
    "up 3 of 16": shuffled(lambda lane: lane - 3 if lane % 16 >= 3 else lane),
    "down 5": shuffled(lambda lane: lane + 5 if lane < 27 else lane),
    "down 5 of 8": shuffled(lambda lane: lane + 5 if lane % 8 < 3 else lane),
    "xor 9": shuffled(lambda lane: lane ^ 9),
    "xor 9 of 8": shuffled(lambda lane: lane ^ 9 if (lane ^ 9) // 8 <= lane // 8 else lane),
    "double": shuffled(lambda lane: lane ^ 16, lambda v: v + 0.1),
    "float": shuffled(lambda lane: lane ^ 4, lambda v: v + 0.5),
    "int64": shuffled(lambda lane: lane ^ 1, lambda v: v * 2.0**40),
    "float2": shuffled(lambda lane: lane ^ 2),
}
VOTES = {
    "ballot": bits(range(32)),
    "any": 1,
    "any not": 0,
    "all": 1,
    "all not": min(VALUES) > 0,
    "add": sum(VALUES) - 32 * 40,
    "min": min(VALUES) - 40,
    "max": max(VALUES) - 40,
    "max unsigned": max((v - 40) % 2**32 for v in VALUES),
}


@pytest.mark.parametrize("order", ORDERS)
def test_warp(run: Run, order: str) -> None:
    got = values_of(run("warp", order=order))
    for name, expected in SHUFFLES.items():
        assert got[name] == expected, name
    for name, vote in VOTES.items():
        assert got[name] == [vote] * 32, name


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_warp(run: Run, order: str) -> None:
    got = values_of(run("warp", order=order))
    assert got["halves"] == [sum(VALUES[:16])] * 16 + [VALUES[16]] * 16
    assert got["single"] == VALUES
    assert got["rest ballot"][:20] == [bits(range(20))] * 20
    assert got["rest add"][:20] == [sum(VALUES[:20])] * 20
    assert got["rest xor"][:20] == [VALUES[lane ^ 2] for lane in range(20)]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_grid(run: Run, order: str, threads: int) -> None:
    got = values_of(run("grid", order=order, threads=threads))
    assert got["indices"] == [1000 * block + thread for block in range(12) for thread in range(60)]
    count, some, none, all_, not_all = (got["barriers"][100 * i : 100 * i + 90] for i in range(5))
    assert (count, some, none, all_, not_all) == ([30] * 90, [1] * 90, [0] * 90, [1] * 90, [0] * 90)
    total, most, least, first, winners, exchanged = got["counts"]
    assert (total, most, least, winners, exchanged) == (2 * 1920, 1919, -1919, 1, 70)
    assert got["others"] == [2**32 - 1, 960, 1920 * 2**33]
    assert got["total"] == [300 * sum(range(64))]
    if threads == 1 and order != "random":
        assert first == {"forward": 1, "backward": 1920}[order]


def test_bf16_and_fp16_are_those_of_torch(run: Run) -> None:
    spread = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int32).view(torch.float32)
    fp16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    bf16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    halves = (fp16.float() + fp16.roll(1).float()) / 2  # ties of fp16
    ties = torch.arange(0x3F80, 0x4080, dtype=torch.int32) * 2**16 + 2**15  # of bf16
    floats = torch.cat([spread, halves, ties.view(torch.float32), torch.tensor([65519.0, 65520, 2**-25, 2.9e-39])])
    done = run("numbers", stdin=floats.numpy().tobytes())
    narrow, wide = done.stdout[: 4 * len(floats)], done.stdout[4 * len(floats) :]
    got = torch.frombuffer(bytearray(narrow), dtype=torch.int16).view(2, -1)
    for bits_of, dtype in zip(got, (torch.bfloat16, torch.float16), strict=True):
        torch.testing.assert_close(bits_of.view(dtype), floats.to(dtype), rtol=0, atol=0, equal_nan=True)
    exact = torch.cat([bf16.float(), fp16.float()])
    got = torch.frombuffer(bytearray(wide), dtype=torch.float32)
    torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
