"""What vLLM allocates for a page."""

from __future__ import annotations

from dataclasses import replace

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from sparseserve.policies import Policy
from sparseserve.types import HeadShape


def with_page_state(spec: AttentionSpec, policy: Policy) -> AttentionSpec:
    """The spec with room for the policy's state in the tail of every page.

    vLLM then allocates, prices, hashes, evicts and moves the state with its page.
    """
    if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
        return spec
    heads = HeadShape(spec.num_kv_heads, 1, spec.head_size)
    extra = policy.page_state_bytes(heads, spec.block_size, spec.dtype.itemsize)
    return replace(spec, page_size_padded=spec.unpadded_page_size_bytes + extra) if extra else spec
