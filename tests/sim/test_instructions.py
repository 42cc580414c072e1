"""The instructions of ptx.h against PTX's definitions."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.sim_programs import ORDERS, Run, values_of


@pytest.fixture(scope="module", params=ORDERS)
def got(run: Run, request: pytest.FixtureRequest) -> dict[str, list[float]]:
    return values_of(run("instructions", order=request.param))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mma(got: dict[str, list[float]], dtype: str) -> None:
    a, b = torch.full((16, 16), torch.nan), torch.full((16, 8), torch.nan)
    c, result = torch.full((16, 8), torch.nan), torch.full((16, 8), torch.nan)
    for lane, held in enumerate(torch.tensor(got[f"mma_{dtype}"]).view(32, 20)):
        group, in_group = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            a[row, in_group * 2 + i % 2 + (0 if i < 4 else 8)] = held[i]
        for i in range(4):
            b[in_group * 2 + i % 2 + (0 if i < 2 else 8), group] = held[8 + i]
            at = group if i < 2 else group + 8, in_group * 2 + i % 2
            c[at], result[at] = held[12 + i], held[16 + i]
    torch.testing.assert_close(result, a @ b + c, rtol=0, atol=0)


def test_transpose(got: dict[str, list[float]]) -> None:
    matrix = torch.arange(64.0).view(8, 8)
    torch.testing.assert_close(torch.tensor(got["transpose"]).view(8, 8), matrix.T, rtol=0, atol=0)


def test_copies_arrive_when_they_are_waited_for(got: dict[str, list[float]]) -> None:
    copies = got["copies"]
    assert copies[:8] == [0, 1, 2, 3, 0, 0, 0, 0]
    assert all(map(math.isnan, copies[8:12]))
    assert copies[12:] == [8, 9, 10, 11]


def test_loads(got: dict[str, list[float]]) -> None:
    assert got["loads"] == [4, 5, 6, 7, 10, 11]


def test_exp2_has_no_subnormals(got: dict[str, list[float]]) -> None:
    assert got["exp2"] == pytest.approx([1, 2**-3.5, 2**-126, 0, 0], rel=1e-6)


def test_permute_bytes(got: dict[str, list[float]]) -> None:
    source = [0x80, 0x81, 0x82, 0x83, 0x04, 0x85, 0x86, 0x07]
    selected = [[0, 1, 4, 5], [2, 3, 6, 7], [3, 2, 1, 0]]
    assert got["permute"] == [sum(source[byte] << 8 * i for i, byte in enumerate(four)) for four in selected]
