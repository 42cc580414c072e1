"""What the ops run in tests: the CPU kernels, or the CUDA kernels in the simulator, on CPU tensors all the same."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sparseserve.cache import cpu_views, cuda_views
from sparseserve.ops import attend_scratch
from sparseserve.ops.library import SCHEMAS, kernels
from sparseserve.types import HeadShape, PagedKV


class Layout(Enum):
    """How pages lie in memory, by vLLM's names where it has one."""

    CPU = "cpu"  # per head K as [D, P], then V as [P, D]
    LBHNC = "LBHNC"  # per head a row for every token, K then V
    LBNHC = "LBNHC"  # per token a row for every head, K then V


_LAYOUT = ContextVar("layout", default=Layout.CPU)
_LARGER = {32: 64, 80: 96}
NO_SIMULATOR = "the simulator of the CUDA kernels was not built; `make test` builds it"


def layout() -> Layout:
    """Of the kernels under test."""
    return _LAYOUT.get()


def fitting(shape: HeadShape, dtype: torch.dtype) -> tuple[HeadShape, torch.dtype]:
    """The shape and dtype, or the next larger head size and fp16 where the CUDA kernels have none of that size."""
    if layout() is Layout.CPU:
        return shape, dtype
    head_dim = _LARGER.get(shape.head_dim, shape.head_dim)
    return HeadShape(shape.kv_heads, shape.group, head_dim), torch.float16 if dtype is torch.float32 else dtype


def cache(memory: Tensor, heads: HeadShape, page_size: int) -> Tensor:
    """The cache [M, H, P, 2D] as vLLM gives it, over `memory` [M, page and tail]."""
    row = 2 * heads.head_dim
    token_first = layout() is Layout.LBNHC
    head, token = (row, heads.kv_heads * row) if token_first else (page_size * row, row)
    shape = (len(memory), heads.kv_heads, page_size, row)
    return memory.as_strided(shape, (memory.stride(0), head, token, 1), memory.storage_offset())


def views(kv_cache: Tensor) -> PagedKV:
    """Keys and values of a cache."""
    return cpu_views(kv_cache) if layout() is Layout.CPU else cuda_views(kv_cache)


@contextmanager
def simulated(pages: Layout) -> Iterator[None]:
    """Ops on CPU tensors run the CUDA kernels in the simulator, on pages of this layout."""
    _simulator()
    library = torch.library.Library("sparseserve", "IMPL")
    for name in SCHEMAS:
        library.impl(name, _route(name), "CPU", allow_override=True)
    token = _LAYOUT.set(pages)
    try:
        yield
    finally:
        _LAYOUT.reset(token)
        library._destroy()


def has_simulator() -> bool:
    """Whether the simulator was built."""
    return importlib.util.find_spec("sparseserve._C_simulator") is not None


@functools.cache
def _simulator() -> ctypes.CDLL:
    kernels()  # loaded later, they would take the ops back
    for name, schema in SCHEMAS.items():
        torch.library.define(f"sparseserve_simulator::{name}", schema)
    spec = importlib.util.find_spec("sparseserve._C_simulator")
    assert spec is not None and spec.origin is not None
    return ctypes.CDLL(spec.origin)


def _route(name: str) -> Callable[..., None]:
    op = getattr(torch.ops.sparseserve_simulator, name)

    def call(*arguments: Any) -> None:
        if name == "attend":
            query = arguments[0]
            arguments = (*arguments[:13], attend_scratch(*query.shape, query.device))
        op(*arguments)

    return call
