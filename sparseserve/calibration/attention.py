"""The attention of a transformers model, seen or replaced layer by layer; never more of its matrix than a block row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sparseserve.errors import Problem, UnsupportedError

IMPLEMENTATION = "sparseserve"  # the name of our attention in transformers
ROWS = 64  # rows of the attention matrix that exist at a time


@dataclass(frozen=True, slots=True)
class Attention:
    """What one layer attends with: one sequence, keys and queries after their rotation, as vLLM caches them."""

    layer: int
    query: Tensor  # [Hq, Tq, D], of the last Tq positions
    key: Tensor  # [H, Tk, D]
    value: Tensor  # [H, Tk, D]
    scale: float

    @property
    def group(self) -> int:
        """G, query heads per KV head; consecutive heads share one."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def start(self) -> int:
        """The position of the first query."""
        return self.key.shape[1] - self.query.shape[1]

    def output(self) -> Tensor:
        """Dense causal attention [Hq, Tq, D]."""
        queries, keys = self.query.shape[1], self.key.shape[1]
        mask = None if queries in (1, keys) else causal_lower_right(queries, keys)
        args = (self.query[None], self.key[None], self.value[None], mask)
        causal = 1 < queries == keys
        return scaled_dot_product_attention(*args, is_causal=causal, scale=self.scale, enable_gqa=self.group > 1)[0]

    def logits(self, first: int, last: int) -> Tensor:
        """scale q.k [Hq, last - first, last] fp32 of the queries at positions first to last - 1, -inf after each."""
        return self.logits_at(torch.arange(first, last, device=self.key.device))

    def logits_at(self, rows: Tensor) -> Tensor:
        """The same [Hq, R, last + 1] of the queries at positions `rows` [R], which ascend to last."""
        last = int(rows[-1]) + 1
        query = self._grouped(self.query[:, rows - self.start].float())
        scores: Tensor = (query * self.scale) @ self.key[:, None, :last].float().mT
        future = torch.arange(last, device=scores.device) > rows[:, None]
        return scores.masked_fill_(future, -torch.inf).flatten(0, 1)

    def weights(self, first: int, last: int) -> Tensor:
        """The softmax of `logits` [Hq, last - first, last] fp32."""
        return self.logits(first, last).softmax(-1)

    def block_rows(self, rows: int = ROWS) -> Iterator[tuple[int, Tensor]]:
        """All weights, `rows` queries at a time: (position of the first, weights [Hq, R, its last + 1])."""
        end = self.key.shape[1]
        for first in range(self.start, end, rows):
            yield first, self.weights(first, min(first + rows, end))

    def masked_output(self, keep: Callable[[int, int], Tensor], rows: int = ROWS) -> Tensor:
        """Causal attention [Hq, Tq, D] to what `keep(first, last)` [Hq or 1, last - first, last] bool leaves."""
        value, end, blocks = self.value[:, None].float(), self.key.shape[1], []
        for first in range(self.start, end, rows):
            last = min(first + rows, end)
            weights = self.logits(first, last).masked_fill(~keep(first, last), -torch.inf).softmax(-1)
            blocks.append((self._grouped(weights) @ value[:, :, :last]).flatten(0, 1))
        return torch.cat(blocks, 1).to(self.query.dtype)

    def _grouped(self, heads: Tensor) -> Tensor:
        """[Hq, ...] -> [H, G, ...]."""
        return heads.reshape(-1, self.group, *heads.shape[1:])


Hook = Callable[[Attention], Tensor | None]  # sees the attention of a layer; may return its output [Hq, Tq, D]
_HOOK: ContextVar[Hook | None] = ContextVar("hook", default=None)


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Show `hook` the attention of every layer that runs in this block, in order."""
    token = _HOOK.set(hook)
    try:
        yield
    finally:
        _HOOK.reset(token)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; query [1, Hq, Tq, D], key and value [1, H, Tk, D] -> [1, Tq, Hq, D]."""
    _refuse_other_attention(module, query, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention = Attention(module.layer_idx, query[0], key[0], value[0], scale)
    hook = _HOOK.get()
    output = hook(attention) if hook else None
    if output is None:
        output = attention.output()
    return output.transpose(0, 1)[None], None


def _refuse_other_attention(module: Any, query: Tensor, kwargs: dict[str, Any]) -> None:
    """Calibration means the full causal attention of one sequence, as the policies do."""
    found = {
        "sliding window": kwargs.get("sliding_window"),
        "logit soft-capping": kwargs.get("softcap"),
        "attention sinks": kwargs.get("s_aux"),
        "attention that is not causal": None if getattr(module, "is_causal", True) else "is_causal=False",
        "sequences in a batch": query.shape[0] if query.shape[0] > 1 else None,
    }
    for what, value in found.items():
        if value is not None:
            allowed = "full causal attention in every layer, as the policies serve"
            raise UnsupportedError(Problem(what, value, allowed, remedy="take a model of full attention"))


AttentionInterface.register(IMPLEMENTATION, _attend)
