"""Copying a call's memory to a device and back: views of one storage stay views of one storage."""

import torch

from sparseserve.testing.target import copying


def test_views_share_their_copy_and_results_come_back() -> None:
    memory = torch.arange(24.0)
    first, second = memory.as_strided((2, 3), (12, 1)), memory.as_strided((2, 3), (12, 1), 1)

    def op(x: torch.Tensor, number: int, y: torch.Tensor) -> None:
        assert x.data_ptr() != first.data_ptr() and x.stride() == (12, 1)
        x += number
        assert y[0, 0] == 1 + number  # the second view sees it

    copying(op, torch.device("cpu"))(first, 100, second)
    assert first.tolist() == [[100, 101, 102], [112, 113, 114]] and memory[3] == 3


def test_tensors_without_elements_pass() -> None:
    empty = torch.zeros(2, 0, dtype=torch.int32)
    copying(lambda x, y: None, torch.device("cpu"))(empty, torch.zeros(3))
