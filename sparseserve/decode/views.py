"""vLLM's KV cache tensor as our views of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.types import PagedKV, PageState


def cpu_views(kv_cache: Tensor) -> PagedKV:
    """Views of vLLM's CPU cache [M, H, P, 2D]: per page and head K is stored as [D, P], then V as [P, D]."""
    pages, heads, page_size, width = kv_cache.shape
    dim = width // 2
    outer = kv_cache.stride()[:2]
    start = kv_cache.storage_offset()
    shape = (pages, heads, page_size, dim)
    key = torch.as_strided(kv_cache, shape, (*outer, 1, page_size), start)
    value = torch.as_strided(kv_cache, shape, (*outer, dim, 1), start + page_size * dim)
    return PagedKV(key, value)


def cuda_views(kv_cache: Tensor) -> PagedKV:
    """Views of vLLM's CUDA cache [M, H, P, 2D] in any order of its dims: a token's row is K, then V."""
    key, value = kv_cache.chunk(2, -1)
    return PagedKV(key, value)


def page_state(kv_cache: Tensor, kept: PageState | None) -> Tensor | None:
    """What a policy keeps, [M, *shape], in the tails of the pages of `kv_cache` [M, H, P, 2D]; None for nothing."""
    if kept is None:
        return None
    pages, heads, page_size, width = kv_cache.shape
    tail = torch.as_strided(
        kv_cache,
        (pages, kept.bytes(kv_cache.element_size()) // kv_cache.element_size()),
        (kv_cache.stride(0), 1),
        kv_cache.storage_offset() + heads * page_size * width,
    )
    return tail.view(kept.dtype or kv_cache.dtype).view(pages, *kept.shape)
