"""Debugging: pages that windows free are filled with numbers that spoil an answer, before the next step.

Set SPARSESERVE_POISON_FREED_PAGES=1; scheduler and worker must share a process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve import environment

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

# Not NaN: vLLM's attention multiplies what lies behind the end of a row with 0.
POISON = 1e4
ENABLED = os.environ.get(environment.POISON) == "1"

_FREED: set[int] = set()


def freed(pool: BlockPool, blocks: Sequence[KVCacheBlock]) -> None:
    """Remember the blocks that nobody holds any more; no prefix finds them again."""
    gone = {block.block_id for block in blocks if block.ref_cnt == 0}
    pool.evict_blocks(gone)
    _FREED.update(gone)


def fill(pages: Tensor) -> None:
    """Fill the freed pages of a pool [M, ...] before anything is written to them."""
    if _FREED:
        pages[torch.tensor(sorted(_FREED), device=pages.device)] = POISON
        _FREED.clear()
