"""What the ops run in tests: the CPU kernels, or the CUDA kernels in the simulator, on CPU tensors all the same."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sparseserve.decode.views import cpu_views, cuda_views
from sparseserve.ops import step_scratch
from sparseserve.ops.library import SCHEMAS, kernels
from sparseserve.types import HeadShape, PagedKV


class Layout(Enum):
    """How pages lie in memory, by vLLM's names where it has one."""

    CPU = "cpu"  # per head K as [D, P], then V as [P, D]
    LBHNC = "LBHNC"  # per head a row for every token, K then V
    LBNHC = "LBNHC"  # per token a row for every head, K then V


_LAYOUT = ContextVar("layout", default=Layout.CPU)
_LARGER = {32: 64, 80: 96}
CHUNKS = 1 << 14  # that a test may search at a time
NO_SIMULATOR = "the simulator of the CUDA kernels was not built; `make test` builds it"


def layout() -> Layout:
    """Of the kernels under test."""
    return _LAYOUT.get()


def fitting(shape: HeadShape, dtype: torch.dtype) -> tuple[HeadShape, torch.dtype]:
    """The shape and dtype, or the next larger head size and fp16 where the CUDA kernels have none of that size."""
    if layout() is Layout.CPU:
        return shape, dtype
    head_dim = _LARGER.get(shape.head_dim, shape.head_dim)
    return HeadShape(shape.kv_heads, shape.queries_per_kv, head_dim), torch.float16 if dtype is torch.float32 else dtype


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
    with _routed(pages, lambda name: getattr(torch.ops.sparseserve_simulator, name)):
        yield


@contextmanager
def on_gpu(pages: Layout) -> Iterator[None]:
    """Ops on CPU tensors run the CUDA kernels on the GPU, on copies of all memory behind the tensors, and back."""
    kernels("cuda")
    with _routed(pages, lambda name: copying(getattr(torch.ops.sparseserve, name), torch.device("cuda"))):
        yield


def has_simulator() -> bool:
    """Whether the simulator was built."""
    return _library() is not None


def use_order(name: str) -> None:
    """Let the simulator run the threads of a block forward, backward or random."""
    if not _simulator().sparseserve_sim_use_order(name.encode()):
        raise ValueError(f"order must be forward, backward or random, not {name}")


def launches() -> int:
    """How many kernels the simulator was given so far."""
    number: int = _simulator().sparseserve_sim_launches()
    return number


def _library() -> str | None:
    """The simulator, or the build of it, with sanitizers perhaps, that SPARSESERVE_SIMULATOR names."""
    spec = importlib.util.find_spec("sparseserve._C_simulator")
    return os.environ.get("SPARSESERVE_SIMULATOR") or (spec.origin if spec else None)


@functools.cache
def _simulator() -> ctypes.CDLL:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"sparseserve_simulator::{name}", schema)
    library = ctypes.CDLL(_library())
    library.sparseserve_sim_use_order.restype = ctypes.c_bool
    library.sparseserve_sim_launches.restype = ctypes.c_uint64
    return library


@contextmanager
def _routed(pages: Layout, op: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    kernels()  # loaded later, they would take the ops back
    library: Any = torch.library.Library("sparseserve", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        scratch = functools.cache(step_scratch)  # from call to call, as a step has it
        for name in SCHEMAS:
            library.impl(name, _with_room(name, op(name), scratch), "CPU", allow_override=True)
    token = _LAYOUT.set(pages)
    try:
        yield
    finally:
        _LAYOUT.reset(token)
        library._destroy()


def _with_room(name: str, op: Callable[..., None], scratch: Callable[..., Tensor]) -> Callable[..., None]:
    """The op with the memory that CUDA needs and the CPU does not: scratch, and scores of `search_blocks`."""
    schema = getattr(torch.ops.sparseserve, name).default._schema
    at = {argument.name: index for index, argument in enumerate(schema.arguments)}
    if "scratch" not in at:
        return op

    def call(*arguments: Any) -> None:
        values = [*arguments, *[None] * (len(at) - len(arguments))]
        query = values[at["query"]]
        if values[at["scratch"]] is None:
            values[at["scratch"]] = scratch(*query.shape, query.device)
        if name == "search_blocks":
            values[at["scores"]] = query.new_empty((*values[at["count"]].shape, CHUNKS), dtype=torch.float32)
        op(*values)

    return call


def copying(op: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """The op on copies on `device` of all memory behind its tensors, and back."""

    def call(*arguments: Any) -> None:
        memory: dict[int, tuple[Tensor, Tensor]] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            _, copy = memory.setdefault(storage.data_ptr(), (whole, whole.to(device, copy=True)))
            return copy.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())

        op(*map(copied, arguments))
        for whole, copy in memory.values():
            whole.copy_(copy)

    return call
