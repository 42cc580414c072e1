"""The demo model in plain torch, with sparse decode attention as boolean masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseserve.demo.build import weights
from sparseserve.demo.circuits import (
    BOS_ID,
    EOS_ID,
    GROUP,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    RESELECT_LAYER,
    rotary_frequencies,
)

Policy = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, query [KV_HEADS, GROUP, D], key [KV_HEADS, T, D]) -> which tokens the row attends to, [KV_HEADS, T] bool."""


def encode(text: str) -> list[int]:
    return [BOS_ID, *text.encode()]


class Simulator:
    """One sequence at a time: `prefill` it, then `decode` it under as many policies as wanted."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        state = {name: tensor.to(dtype) for name, tensor in weights().items()}
        self.embed, self.head = state["model.embed_tokens.weight"], state["lm_head.weight"]
        self.norm = state["model.norm.weight"]
        self.layers = [
            {name.split(".", 3)[3]: tensor for name, tensor in state.items() if name.startswith(f"model.layers.{i}.")}
            for i in range(LAYERS)
        ]
        self.masses: list[Tensor] = []  # attention probabilities [LAYERS, HEADS, T] of each decoded token

    def prefill(self, ids: list[int], chunk: int = 2048) -> None:
        """Dense; keeps the cache and the logits [VOCAB] of the last token."""
        self.caches = [torch.zeros(2, KV_HEADS, len(ids) + 32, HEAD_DIM, dtype=self.dtype) for _ in self.layers]
        self.length = len(ids)
        for start in range(0, len(ids), chunk):
            self.logits = self._forward(torch.tensor(ids[start : start + chunk]), start, None)

    def decode(self, policy: Policy | None = None, limit: int = 16) -> str:
        """Greedy continuation of the prefilled sequence; the first token comes from the prefill."""
        logits, text = self.logits, ""
        self.masses = []
        for position in range(self.length, self.length + limit):
            token = int(logits.argmax())
            if token == EOS_ID:
                break
            text += chr(token)
            logits = self._forward(torch.tensor([token]), position, policy or dense)
        return text

    def _forward(self, ids: Tensor, start: int, policy: Policy | None) -> Tensor:
        x = self.embed[ids]
        probabilities = []
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, start)
            key, value = self.caches[index]
            end = start + len(ids)
            key[:, start:end], value[:, start:end] = k, v
            key, value = key[:, :end], value[:, :end]
            if policy is None:
                mask = torch.ones(len(ids), end, dtype=torch.bool).tril(start)
                y = F.scaled_dot_product_attention(q[None], key[None], value[None], mask, enable_gqa=True)[0]
            else:
                grouped = q.view(KV_HEADS, GROUP, HEAD_DIM)
                scores = (grouped.float() @ key.float().mT) / HEAD_DIM**0.5
                scores = scores.masked_fill(~policy(index, grouped, key)[:, None], -torch.inf)
                probabilities.append(scores.softmax(-1).flatten(0, 1))
                y = (scores.softmax(-1) @ value.float()).to(self.dtype).view(HEADS, 1, HEAD_DIM)
            x = x + F.linear(y.transpose(0, 1).flatten(1), layer["self_attn.o_proj.weight"])
            h = self._rms(x, layer["post_attention_layernorm.weight"])
            hidden = F.silu(F.linear(h, layer["mlp.gate_proj.weight"])) * F.linear(h, layer["mlp.up_proj.weight"])
            x = x + F.linear(hidden, layer["mlp.down_proj.weight"])
        if probabilities:
            self.masses.append(torch.stack(probabilities))
        return F.linear(self._rms(x[-1:], self.norm), self.head)[0]

    def _project(self, layer: dict[str, Tensor], x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        h = self._rms(x, layer["input_layernorm.weight"])
        q, k, v = (
            F.linear(h, layer[f"self_attn.{n}_proj.weight"], layer[f"self_attn.{n}_proj.bias"])
            .view(len(x), -1, HEAD_DIM)
            .transpose(0, 1)
            for n in "qkv"
        )
        angle = torch.arange(start, start + len(x))[:, None] * rotary_frequencies().repeat(2)
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)

        def rotate(t: Tensor) -> Tensor:
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat([-second, first], -1) * sin

        return rotate(q), rotate(k), v

    @staticmethod
    def _rms(x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def dense(layer: int, query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(KV_HEADS, key.shape[1], dtype=torch.bool)


def window(sink: int, recent: int, heads: set[tuple[int, int]] | None = None) -> Policy:
    """Sink and recent tokens alone for the (layer, kv_head) pairs in `heads`, or for all."""

    def policy(layer: int, query: Tensor, key: Tensor) -> Tensor:
        keep = dense(layer, query, key)
        for head in range(KV_HEADS):
            if heads is None or (layer, head) in heads:
                keep[head, sink : max(sink, key.shape[1] - recent)] = False
        return keep

    return policy


def tidal(budget: int, reselect: int | None = RESELECT_LAYER) -> Policy:
    """Layers 0 and 1 dense; layer 2 and `reselect` dense, choosing by attention mass; the others reuse the choice."""
    chosen: Tensor | None = None

    def policy(layer: int, query: Tensor, key: Tensor) -> Tensor:
        nonlocal chosen
        keep = dense(layer, query, key)
        if layer in (2, reselect):
            mass = ((query.float() @ key.float().mT) / HEAD_DIM**0.5).softmax(-1).sum(1)
            best = mass.topk(min(budget, key.shape[1])).indices
            chosen = torch.zeros_like(keep).scatter(1, best, True)
            return keep
        return keep if chosen is None or layer < 2 else chosen

    return policy


def quest(bound: str, budget: int = 1024, unit: int = 32, sink: int = 16, recent: int = 64) -> Policy:
    """From layer 2 on: sink, recent, and the units of the best bound, `mean_std` or `min_max`."""

    def policy(layer: int, query: Tensor, key: Tensor) -> Tensor:
        keep, length = dense(layer, query, key), key.shape[1]
        if layer < 2 or length <= budget:
            return keep
        units = length // unit
        tokens = key[:, : units * unit].float().reshape(len(key), units, unit, -1)  # [H, units, unit, D]
        if bound == "mean_std":
            center, half = tokens.mean(2), tokens.std(2, unbiased=False)
        else:
            low, high = tokens.amin(2), tokens.amax(2)
            center, half = (low + high) / 2, (high - low) / 2
        q = query.float()
        score = (q @ center.mT + q.abs() @ half.mT).amax(1)  # [H, units]
        starts = torch.arange(units) * unit
        score[:, (starts + unit <= sink) | (starts >= length - recent)] = -torch.inf
        best = score.topk((budget - sink - recent) // unit).indices
        keep[:] = False
        for head in range(KV_HEADS):
            keep[head, (starts[best[head]][:, None] + torch.arange(unit)).flatten()] = True
        keep[:, :sink] = keep[:, length - recent :] = True
        return keep

    return policy
