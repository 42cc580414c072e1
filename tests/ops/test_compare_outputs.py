"""compare_outputs: what was lost, to fp32's last bits, whatever stands around a row; nothing of rows not measured."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve import ops, reference
from sparseserve.testing import target
from sparseserve.testing.cases import DTYPES, HEAD_DIMS, OPCHECKS, sample_grid
from sparseserve.testing.target import Layout
from sparseserve.types import HeadShape

GRID = sample_grid(12, dtype=DTYPES, head_dim=HEAD_DIMS, heads=[1, 2, 7, 32, 40], rows=[1, 3, 9])
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]
INF = torch.inf


def make(point: dict[str, Any]) -> Arguments:
    """Outputs in the middle of wider rows and heads, each tensor with strides of its own."""
    draw = torch.Generator().manual_seed(point["heads"])
    shape, dtype = target.fitting(HeadShape(point["heads"], 1, point["head_dim"]), point["dtype"])
    rows, heads, dim = point["rows"], point["heads"], shape.head_dim
    dense = torch.randn(rows, heads, dim, generator=draw)
    sparse = dense + torch.rand(rows, heads, 1, generator=draw) * torch.randn(rows, heads, dim, generator=draw)
    wide = torch.full((2, heads + 3, rows + 1, dim + 3), torch.nan, dtype=dtype)
    wide[0, 2:-1, 1:, 1:-2], wide[1, 1:-2, :-1, 3:] = sparse.transpose(0, 1), dense.transpose(0, 1)
    out, dense_out = wide[0, 2:-1, 1:, 1:-2].transpose(0, 1), wide[1, 1:-2, :-1, 3:].transpose(0, 1)
    lse = torch.randn(rows, heads, generator=draw) * 30
    return out, lse - torch.rand(rows, heads, generator=draw), dense_out, lse


def measured(arguments: Arguments, function: Any = ops.compare_outputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Recall and error."""
    recall, error = torch.full((2, len(arguments[0])), -7, dtype=options.get("dtype", torch.float32)).unbind()
    function(*arguments, recall, error, **options)
    return recall, error


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_against_fp64(point: dict[str, Any], isa: str) -> None:
    arguments = make(point)
    exact = measured(arguments, reference.compare_outputs, dtype=torch.float64)
    for found, expected in zip(measured(arguments), exact, strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    assert ((exact[0] > 0.3) & (exact[0] < 1) & (exact[1] > 0.01)).all()


def test_the_numbers(isa: str) -> None:
    """Of one row: heads that lost nothing, a tenth of the output's length, and all of the mass."""
    dense = torch.zeros(1, 3, 64)
    dense[0, :, 0], dense[0, 1, 1] = torch.tensor([2.0, 30.0, 4.0]), 40
    out = dense.clone()
    out[0, 1, 5], out[0, 2] = 5, 0
    arguments = out.half(), torch.tensor([[3.0, 4.0, -INF]]), dense.half(), torch.tensor([[3.0, 5.0, 6.0]])
    recall, error = measured(arguments)
    torch.testing.assert_close(recall, torch.tensor([1 + 1 / torch.e]) / 3)
    torch.testing.assert_close(error, torch.tensor([0 + 0.1 + 1]) / 3)


def test_equal_outputs_lose_nothing(isa: str) -> None:
    out, lse, *_ = make(GRID[0])
    recall, error = measured((out, lse, out, lse))
    assert (recall == 1).all() and (error == 0).all()
    recall, error = measured((torch.zeros_like(out), lse, torch.zeros_like(out), lse))
    assert (recall == 1).all() and (error == 0).all()


def test_rows_without_dense_attention_are_not_numbers(isa: str) -> None:
    """Padding, and rows that are not measured, whose memory may hold anything; the others have theirs."""
    out, lse, dense, dense_lse = make({"dtype": torch.bfloat16, "head_dim": 64, "heads": 5, "rows": 5})
    expected = measured((out, lse, dense, dense_lse))
    none = torch.tensor([True, False, True, False, False])
    dense_lse[none], dense[none], lse[0], out[0] = -INF, 0, -INF, torch.nan
    for found, full in zip(measured((out, lse, dense, dense_lse)), expected, strict=True):
        assert found[none].isnan().all() and torch.equal(found[~none], full[~none])
    plain = measured((out, lse, dense, dense_lse), reference.compare_outputs)
    assert all(torch.equal(found.isnan(), none) for found in plain)


@pytest.mark.parametrize("point", GRID, ids=lambda point: "-".join(map(str, point.values())))
def test_rows_under_the_floor_take_the_dense_output(point: dict[str, Any], isa: str) -> None:
    out, lse, dense, dense_lse = make({**point, "rows": 9})
    dense_lse[4] = -INF  # not measured
    recall, _ = measured((out, lse, dense, dense_lse))
    floor = float(recall[recall.isfinite()].median())
    expected = torch.where((recall < floor)[:, None, None], dense, out)
    again, _ = measured((out, lse, dense, dense_lse), floor=floor)
    assert torch.equal(out, expected) and torch.equal(again.nan_to_num(2), recall.nan_to_num(2))
    assert 0 < int((recall < floor).sum()) < 9


@pytest.mark.parametrize("point", GRID[:4], ids=str)
def test_rows_are_independent(point: dict[str, Any], isa: str) -> None:
    arguments = make({**point, "rows": 9})
    together = measured(arguments)
    for rows in ([8], [3, 0], list(range(8, -1, -1))):
        for found, full in zip(measured(tuple(x[rows] for x in arguments)), together, strict=True):  # type: ignore[arg-type]  # four tensors
            assert torch.equal(found, full[rows])


@pytest.mark.parametrize("order", ["backward", "random"])
def test_the_order_of_threads_changes_nothing(order: str) -> None:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with target.simulated(Layout.LBHNC):
        arguments = make({**GRID[0], "heads": 40})
        before, forward = target.launches(), measured(arguments)
        assert target.launches() - before == 1
        target.use_order(order)
        try:
            assert all(map(torch.equal, measured(arguments), forward))
        finally:
            target.use_order("forward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0].double(), *a[1:]), "out must be"),
        (lambda a: (a[0].float(), *a[1:]), "dense_out must be"),
        (lambda a: (*a[:2], a[2][:, :1], a[3]), r"dense_out.shape\[1\]"),
        (lambda a: (a[0][..., ::2], *a[1:]), "out.stride"),
        (lambda a: (a[0], a[1].half(), *a[2:]), "lse must be"),
        (lambda a: (*a[:3], a[3][:1]), r"dense_lse.shape\[0\]"),
    ],
)
def test_wrong_arguments_are_named(change: Any, message: str) -> None:
    arguments = make({"dtype": torch.bfloat16, "head_dim": 64, "heads": 2, "rows": 3})
    with pytest.raises(RuntimeError, match=message):
        measured(change(arguments))


def test_opcheck() -> None:
    arguments = make({"dtype": torch.bfloat16, "head_dim": 64, "heads": 2, "rows": 3})
    inputs = *arguments, torch.zeros(3), torch.zeros(3), 0.5
    torch.library.opcheck(torch.ops.sparseserve.compare_outputs.default, inputs, test_utils=OPCHECKS)
