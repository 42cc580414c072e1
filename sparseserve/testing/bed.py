"""A decode step without vLLM: rows of random keys and values in a shuffled page pool, every layer under one policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.decode.layer import decode_layer
from sparseserve.decode.step import StepBuffers
from sparseserve.decode.views import page_state
from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.policies.base import SparseLayer
from sparseserve.testing import target
from sparseserve.types import LayerPlan, Measurement, NewTokens, PageTable, Selection


@dataclass(frozen=True, slots=True)
class Outcome:
    """What every layer of one step did."""

    out: Tensor  # [L, B, Hq, D]
    masks: list[Tensor]  # per layer [B, Hs, T] bool, tokens attended to
    selections: list[Selection]  # per layer, copies
    attended: list[Tensor]  # per layer [B, Hs] int32, as the kernel counted
    measurement: Measurement | None  # views of the buffers, where the policy measures


class Bed:
    """A page pool for `lengths` rows; `filler` is what unused memory holds at the start."""

    def __init__(
        self,
        policy: Policy,
        model: ModelShape,
        lengths: list[int],
        *,
        page_order: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        filler: float = 0.0,
    ) -> None:
        self.policy, self.model, self.lengths = policy, model, lengths
        self.page_size = page_size = model.page_size
        heads = model.heads
        per_row = -(-model.max_len // page_size)
        pool = per_row * len(lengths) + 1
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(page_order))
        self.pages = order[: per_row * len(lengths)].view(len(lengths), per_row).to(torch.int32)
        page = heads.kv_heads * page_size * 2 * heads.head_dim
        tail = policy.page_state_bytes(heads, page_size, dtype.itemsize) // dtype.itemsize
        memory = torch.full((model.layers, pool, page + tail), filler, dtype=dtype)
        plans = policy.plans(model)
        caches = (target.cache(layer, heads, page_size) for layer in memory)
        self.layers = [self._layer(cache, plan) for cache, plan in zip(caches, plans, strict=True)]
        self.buffers = StepBuffers(policy, plans, heads, len(lengths), model.max_len)

    def _layer(self, cache: Tensor, plan: LayerPlan) -> SparseLayer:
        heads = self.model.heads
        return SparseLayer(
            policy=self.policy,
            plan=plan,
            kv=target.views(cache),
            page_state=page_state(cache, self.policy.page_state(heads, self.page_size)),
            scale=heads.head_dim**-0.5,
        )

    def write(self, layer: int, row: int, start: int, key: Tensor, value: Tensor) -> None:
        """Write key and value [T, H, D] of the tokens from `start` on, as vLLM does, and fold in the summaries."""
        positions = torch.arange(start, start + key.shape[0])
        page = self.pages[row][positions // self.page_size].long()
        offset = positions % self.page_size
        kv = self.layers[layer].kv
        kv.key[page, :, offset], kv.value[page, :, offset] = key, value
        if self.layers[layer].page_state is not None:
            slots = page * self.page_size + offset
            self.policy.update_pages(self.layers[layer], NewTokens(slots, positions))

    def fill(self, keys: Tensor, values: Tensor, chunk: int | None = None) -> Bed:
        """Write every row's tokens from keys and values [L, B, T, H, D], `chunk` tokens at a time."""
        for layer in range(self.model.layers):
            for row, length in enumerate(self.lengths):
                for start in range(0, length, chunk or max(length, 1)):
                    end = min(length, start + (chunk or length))
                    self.write(layer, row, start, keys[layer, row, start:end], values[layer, row, start:end])
        return self

    def decode(self, query: Tensor, rows: list[int] | None = None, row_budget: Tensor | None = None) -> Outcome:
        """One step for `query` [L, B, Hq, D] over `rows` (all by default), in that order; `row_budget` is of these."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        seq_lens = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32)
        measured = [layer.plan.layer for layer in self.layers if not layer.plan.dense_output]
        step = self.buffers.step(PageTable(self.pages[rows], seq_lens), row_budget=row_budget, measured=measured)
        self.policy.prepare(step, self.model)
        outcome = Outcome(torch.zeros_like(query[:, rows]), [], [], [], step.measurement)
        for layer, out in zip(self.layers, outcome.out, strict=True):
            decode_layer(layer, step, query[layer.plan.layer, rows], out)
            dense = layer.plan.dense_output
            used = step.attends_to(layer.plan)
            outcome.masks.append(token_mask(used, seq_lens, self.model.max_len))
            outcome.selections.append(_copy(used))
            attended = step.attended_dense if dense else step.attended
            outcome.attended.append(attended[layer.plan.layer].clone())
        return outcome


def token_mask(selection: Selection, seq_lens: Tensor, length: int) -> Tensor:
    """The attended set of a selection as [B, Hs, length] bool."""
    position = torch.arange(length)
    lens = seq_lens[:, None, None]
    mask = (position < selection.spans[..., :1]) | (position >= selection.spans[..., 1:])
    slot = torch.arange(selection.units.shape[2]) < selection.count[..., None]
    chosen = torch.where(slot, selection.units, -1)
    mask |= (position[:, None] // selection.unit_tokens == chosen[:, :, None, :]).any(-1)
    return mask & (position < lens)


def _copy(selection: Selection) -> Selection:
    return Selection(selection.spans.clone(), selection.units.clone(), selection.count.clone(), selection.unit_tokens)
