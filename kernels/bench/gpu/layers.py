"""Decode rows in the caches of several layers, filled at random; one row and head of them to check kernels with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparseserve.ops import step_scratch
from sparseserve.testing.cases import Case
from sparseserve.types import Gate, HeadShape, PagedKV, PageTable, Selection

DTYPE = torch.bfloat16
LLAMA_8B = HeadShape(kv_heads=8, queries_per_kv=4, head_dim=128)
UNCACHED = 4  # what the layers of a graph read is at least this many times the L2


@dataclass(frozen=True, slots=True)
class Rule:
    """How a policy spends its budget, by the policy's defaults."""

    unit_tokens: int
    sink: int
    recent: int

    def slots(self, budget: int) -> int:
        """Units that sink and recent tokens leave room for."""
        return (budget - self.sink - self.recent) // self.unit_tokens


TIDAL, QUEST, SEER = Rule(1, 0, 1), Rule(32, 16, 64), Rule(64, 0, 0)


@dataclass(frozen=True, slots=True)
class Point:
    """One shape of a decode step."""

    context: int  # tokens of every row, a multiple of the page size
    batch: int
    page_size: int
    budget: int = 2048

    def __str__(self) -> str:
        size = f"{self.context // 1024}k" if self.context >= 1024 else str(self.context)
        return f"{size} x {self.batch}"


class Layers:
    """The caches [L, M, H, P, 2D] of L layers under one page table whose pages are shuffled, as vLLM has them.

    Every page has a tail with the summaries of quest and the gate keys of seer, as far as its size is a multiple of
    their units. L is such that the least that a call reads of a layer is `UNCACHED` times the L2 over all layers.
    """

    def __init__(
        self, point: Point, heads: HeadShape, token_first: bool, device: torch.device, l2_bytes: int, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.point, self.heads, self.device = point, heads, device
        kv_heads, dim, size = heads.kv_heads, heads.head_dim, point.page_size
        per_row = point.context // size
        self.pool = point.batch * per_row
        self.quest_units, self.seer_units = size // QUEST.unit_tokens, size // SEER.unit_tokens
        keys_and_values = kv_heads * size * 2 * dim
        pair, gate_key = kv_heads * 2 * dim, kv_heads * 2 * dim  # numbers of 16 bits; gate keys are fp32
        gates_at = keys_and_values + self.quest_units * pair
        page = gates_at + self.seer_units * gate_key

        read = [point.batch * point.budget * 2 * kv_heads * dim]
        read += [self.pool * self.quest_units * pair] if self.quest_units else []
        read += [self.pool * self.seer_units * gate_key] if self.seer_units else []
        self.count = -(-UNCACHED * l2_bytes // (min(read) * DTYPE.itemsize))

        self.memory = torch.empty(self.count, self.pool, page, dtype=DTYPE, device=device)
        for layer in self.memory:
            layer.normal_()
        row = 2 * dim
        head, token = (row, kv_heads * row) if token_first else (size * row, row)
        self.caches = self.memory.as_strided(
            (self.count, self.pool, kv_heads, size, row), (self.pool * page, page, head, token, 1)
        )
        self.summaries = self.memory[..., keys_and_values:gates_at].unflatten(-1, (kv_heads, self.quest_units, 2, dim))
        self.summaries[..., 1, :].abs_()  # standard deviations
        gate_keys = self.memory[..., gates_at:].view(torch.float32)
        self.gate_keys = gate_keys.unflatten(-1, (kv_heads, self.seer_units, dim)).normal_()

        order = torch.randperm(self.pool, device=device)
        self.pages = order.view(point.batch, per_row).int()
        self.seq_lens = torch.full((point.batch,), point.context, dtype=torch.int32, device=device)
        self.table = PageTable(self.pages, self.seq_lens)
        self.query = torch.randn(point.batch, heads.query_heads, dim, device=device).mul(2).to(DTYPE)
        self.scale = dim**-0.5
        self.scratch = step_scratch(point.batch, heads.query_heads, dim, device)
        draw = random.Random(seed)
        self.row, self.head = draw.randrange(point.batch), draw.randrange(kv_heads)

    def kv(self, layer: int) -> PagedKV:
        """Keys and values of a layer."""
        return PagedKV(*self.caches[layer].chunk(2, -1))

    @cached_property
    def gates(self) -> list[Gate]:
        """Gates of all layers; they share the rotation of Llama 3."""
        heads, group, dim = self.heads.kv_heads, self.heads.queries_per_kv, self.heads.head_dim
        frequency = 5e5 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(self.point.context)[:, None] * frequency
        rope = torch.cat([angle.cos(), angle.sin()], 1).float().to(self.device)
        weights = torch.randn(self.count, heads, group, dim, dim, device=self.device) / dim
        norm, unused = 1 + torch.randn(dim, device=self.device) / 8, rope.new_empty(0)
        return [Gate(weight, unused, norm, norm, unrope=rope, rope=rope) for weight in weights]

    def empty_selections(self, rule: Rule) -> tuple[tuple[Tensor, ...], list[Selection]]:
        """Buffers for what all layers select, and what is each layer's of them."""
        rows, slots = self.point.batch, rule.slots(self.point.budget)
        whole = Selection.empty(self.count * rows, self.heads.kv_heads, slots, rule.unit_tokens, self.device)
        buffers = whole.spans, whole.units, whole.count
        parts = zip(*(buffer.split(rows) for buffer in buffers), strict=True)
        return buffers, [Selection(spans, units, count, rule.unit_tokens) for spans, units, count in parts]

    def everything(self) -> Selection:
        """All tokens of all rows."""
        selection = Selection.empty(self.point.batch, 1, 0, 1, self.device)
        selection.spans.fill_(self.point.context)
        return selection

    def random_selection(self, rule: Rule) -> Selection:
        """Sink, recent tokens and random units, as many as the budget allows."""
        context, slots = self.point.context, rule.slots(self.point.budget)
        selection = Selection.empty(self.point.batch, self.heads.kv_heads, slots, rule.unit_tokens, self.device)
        units = -(-(context - rule.recent) // rule.unit_tokens)
        draw = torch.rand(*selection.count.shape, units, device=self.device)
        selection.units.copy_(draw.topk(slots).indices.sort().values)
        selection.count.fill_(slots)
        selection.spans[..., 0], selection.spans[..., 1] = rule.sink, context - rule.recent
        return selection

    def sample(self, layer: int) -> Case:
        """The sampled row and KV head of a layer, on the CPU."""
        pages, group = self.pages[self.row].long(), self.heads.queries_per_kv
        kv = self.kv(layer)
        halves = (half[pages, self.head][:, None].cpu() for half in (kv.key, kv.value))
        return Case(
            query=self.sampled_queries(self.query),
            kv=PagedKV(*halves),
            pages=torch.arange(len(pages), dtype=torch.int32)[None],
            seq_lens=self.seq_lens[self.row :][:1].cpu(),
            shape=HeadShape(1, group, self.heads.head_dim),
        )

    def sampled_queries(self, x: Tensor) -> Tensor:
        """Of x [B, Hq, ...] what belongs to the sample, [1, G, ...], on the CPU."""
        return x[self.row, self.head * self.heads.queries_per_kv :][: self.heads.queries_per_kv][None].cpu()

    def sampled_heads(self, x: Tensor) -> Tensor:
        """Of x [B, Hs, ...] what belongs to the sample, [1, 1, ...], on the CPU."""
        return x[self.row, min(self.head, x.shape[1] - 1)][None, None].cpu()

    def sampled_pages(self, pool: Tensor) -> Tensor:
        """Of a pool [M, H, ...] the pages and the head of the sample, [N, 1, ...], on the CPU."""
        return pool[self.pages[self.row].long(), self.head][:, None].cpu()

    def sampled_selection(self, selection: Selection) -> Selection:
        """The selection of the sample, on the CPU."""
        buffers = selection.spans, selection.units, selection.count
        spans, units, count = (self.sampled_heads(buffer) for buffer in buffers)
        return Selection(spans, units, count, selection.unit_tokens)
