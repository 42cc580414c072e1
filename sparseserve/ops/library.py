"""The torch library `sparseserve`: schemas, fakes, and the compiled kernels behind them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch

# A selection to be filled, if any.
_WANTED = (
    "Tensor? sink=None, Tensor? recent=None, Tensor? budget=None, float? threshold=None, Tensor? row_budget=None, "
    "Tensor(b!)? spans=None, Tensor(c!)? units=None, Tensor(d!)? count=None"
)
_SCRATCH = "Tensor(e!)? scratch=None"
SCHEMAS = {
    "summarize_pages": "(Tensor key, Tensor slots, Tensor(a!) summary, int bound) -> ()",
    "score_pages": "(Tensor query, Tensor summary, Tensor pages, Tensor seq_lens, int unit_tokens, int bound, "
    f"Tensor(a!) scores, {_WANTED}, {_SCRATCH}) -> ()",
    "score_tokens": "(Tensor query, Tensor key, Tensor pages, Tensor seq_lens, Tensor lse, float scale, "
    f"int unit_tokens, Tensor(a!) scores, {_WANTED}, {_SCRATCH}) -> ()",
    "summarize_gates": "(Tensor key, Tensor slots, Tensor positions, Tensor weight, Tensor? norm, Tensor unrope, "
    "Tensor? rope, Tensor(a!) summary) -> ()",
    "score_gates": "(Tensor query, Tensor summary, Tensor pages, Tensor seq_lens, int unit_tokens, Tensor weight, "
    f"Tensor? norm, Tensor unrope, Tensor? rope, Tensor(a!) scores, {_WANTED}) -> ()",
    "select_units": "(Tensor scores, Tensor seq_lens, int unit_tokens, Tensor sink, Tensor recent, Tensor budget, "
    "float? threshold, Tensor? row_budget, Tensor(a!) spans, Tensor(b!) units, Tensor(c!) count) -> ()",
    "search_blocks": "(Tensor query, Tensor key, Tensor pages, Tensor seq_lens, Tensor(a!) state, int[] chunk_tokens, "
    "int[] stage_tokens, int[] refresh_steps, Tensor sink, Tensor recent, Tensor budget, Tensor? row_budget, "
    f"Tensor(b!) spans, Tensor(c!) units, Tensor(d!) count, Tensor(f!)? scores=None, {_SCRATCH}) -> ()",
    "write_tokens": "(Tensor key, Tensor value, Tensor slots, Tensor(a!) to_key, Tensor(b!) to_value, "
    "Tensor places) -> ()",
    "compare_outputs": "(Tensor(a!) out, Tensor lse, Tensor dense_out, Tensor dense_lse, Tensor(b!) recall, "
    "Tensor(c!) error, float floor) -> ()",
    "attend": "(Tensor query, Tensor key, Tensor value, Tensor pages, Tensor seq_lens, Tensor spans, Tensor units, "
    "Tensor count, int unit_tokens, float scale, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) attended, "
    f"Tensor? places=None, {_SCRATCH}) -> ()",
}


def _fake(*_: object) -> None:
    """Every op writes into its arguments and returns nothing."""


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"sparseserve::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"sparseserve::{_name}", _fake)


@functools.cache
def kernels(device: str = "cpu") -> ctypes.CDLL:
    """The compiled kernels of a device type, cpu or cuda; loading them registers them with torch.

    Raises KernelsNotBuiltError when the package was installed without them.
    """
    spec = importlib.util.find_spec(f"sparseserve._C_{device}")
    if spec is None or spec.origin is None:
        from sparseserve.errors import KernelsNotBuiltError

        option = " -Ccmake.define.SPARSESERVE_CUDA=ON" if device == "cuda" else ""
        raise KernelsNotBuiltError(
            f"The compiled kernels (sparseserve/_C_{device}.so) are missing. "
            f"Build them with `pip install --no-build-isolation{option} -e .` in the source tree, or install the wheel."
        )
    return ctypes.CDLL(spec.origin)


def isa() -> str:
    """The instruction set that the CPU kernels use: avx512_bf16, avx512, avx2 or portable."""
    query = kernels().sparseserve_isa
    query.restype = ctypes.c_char_p
    name: bytes = query()
    return name.decode()


def use_isa(name: str) -> bool:
    """Make the CPU kernels use another instruction set, for tests; False if this machine lacks it."""
    return bool(kernels().sparseserve_use_isa(name.encode()))
