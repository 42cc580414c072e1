"""Exchanging the policy of a running engine: tests and benchmarks share one start-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sparseserve.policies import Policy
from sparseserve.types import HeadShape, NewTokens


def rebind(worker: Any, policy: Policy, pages: Sequence[int] = ()) -> None:
    """Put every attention layer of a vLLM worker under `policy`; give it to `LLM.collective_rpc`.

    The engine must have been started with a policy whose pages have room for the summaries of this one. Summaries of
    cached pages are those of the policy before: reset the prefix cache, or name in `pages` the full pages of a row, in
    order, whose summaries are to be rebuilt from their keys and values. Heads get their pages when an engine starts:
    ValueError for a policy that frees some.
    """
    if policy.frees_pages:
        raise ValueError("the pages of heads cannot be exchanged in a running engine; give kv_memory=shared")
    layers = worker.model_runner.compilation_config.static_forward_context
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                builder.bind(policy)
            for name in group.layer_names if pages else ():
                _rebuild(layers[name], policy, torch.tensor(pages))


def roomiest(policies: Iterable[Policy], heads: HeadShape, page_size: int) -> Policy:
    """The policy whose summaries need the most room in a page of 16-bit numbers: the one to start an engine with."""
    return max(policies, key=lambda policy: policy.page_state_bytes(heads, page_size, 2))


def running_pages(worker: Any) -> list[int]:
    """The full pages of the first running request, in order."""
    batch = worker.model_runner.input_batch
    table = batch.block_table[0]
    full = int(batch.num_tokens_no_spec[0]) // table.block_size
    pages: list[int] = table.block_table.np[0, :full].tolist()
    return pages


def _rebuild(layer: Any, policy: Policy, pages: torch.Tensor) -> None:
    bound = layer.impl.bound(layer.kv_cache)
    if bound.page_state is None:
        return
    size = bound.kv.page_size
    slots = (pages[:, None] * size + torch.arange(size)).flatten()
    policy.update_pages(bound, NewTokens(slots, torch.arange(len(slots))))
