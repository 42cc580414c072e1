"""Bytes that the kernels of a decode layer move, and the least time for it: the model of roofline.py.

A kernel takes the larger of 2.5 us and its bytes at 90 % of the 4.3 TB/s at which an H200 copies; a layer takes the sum
over the kernels that it launches. Unlike roofline.py's, our `attend` has no second kernel that merges.
"""

from __future__ import annotations

from sparseserve.types import HeadShape

COPY_RATE, SHARE, LAUNCH_MICROSECONDS = 4.3e12, 0.9, 2.5
NUMBER, SCORE = 2, 4  # bytes of a cached number, and of a score, a gate key or a gate's weight


def floor_microseconds(kernels: tuple[int, ...]) -> float:
    """The least time of a layer whose kernels move these bytes."""
    return sum(max(LAUNCH_MICROSECONDS, 1e6 * moved / (SHARE * COPY_RATE)) for moved in kernels)


def attend(heads: HeadShape, rows: int, tokens: int) -> int:
    """Keys and values of `tokens` tokens of every row."""
    return rows * tokens * 2 * heads.kv_heads * heads.head_dim * NUMBER


def score_pages(heads: HeadShape, rows: int, units: int) -> int:
    """Two vectors for every unit and head, and the scores."""
    return rows * units * heads.kv_heads * (2 * heads.head_dim * NUMBER + SCORE)


def score_gates(heads: HeadShape, rows: int, units: int) -> int:
    """A gate key for every unit and head, the scores, and the weights of the query's gate once."""
    weights = heads.query_heads * heads.head_dim * heads.head_dim * SCORE
    return weights + rows * units * heads.kv_heads * (heads.head_dim * SCORE + SCORE)


def score_tokens(heads: HeadShape, rows: int, tokens: int) -> int:
    """All keys, and the scores."""
    return rows * tokens * heads.kv_heads * (heads.head_dim * NUMBER + SCORE)


def select(heads: HeadShape, rows: int, units: int, slots: int) -> int:
    """The scores, and what is selected."""
    return rows * heads.kv_heads * 4 * (units + slots)


def summarize_pages(heads: HeadShape, rows: int, unit_tokens: int) -> int:
    """The keys of a unit of every row, and its summary."""
    return rows * heads.kv_heads * (unit_tokens + 2) * heads.head_dim * NUMBER
