"""An attention layer whose KV heads are stored in groups.

In its prompt, a row's heads attend to what they attend to when it decodes: a token is a row of its own length. Heads
that keep everything are vLLM's there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from sparseserve import ops
from sparseserve.decode.step import PROMPT_PIECE, StepBuffers
from sparseserve.plugin.backends.rows import decode_rows, rows_from
from sparseserve.plugin.head_memory.pool import HeadGroups
from sparseserve.policies import Policy
from sparseserve.policies.base import SparseLayer
from sparseserve.types import PagedKV, PageTable, Selection, Step


@dataclass(frozen=True, slots=True)
class Prompt:
    """The query tokens of a row that is in its prompt, each a row of its own length."""

    tokens: slice  # of the batch
    tables: Tensor  # [R, 1, N] int32
    lengths: Tensor  # [T] int32

    def pieces(self, tokens: int) -> Iterator[Prompt]:
        """Of at most `tokens` tokens."""
        for first in range(0, len(self.lengths), tokens):
            lengths = self.lengths[first : first + tokens]
            begin = self.tokens.start + first
            yield Prompt(slice(begin, begin + len(lengths)), self.tables, lengths)


@dataclass(frozen=True, slots=True)
class GroupedStep:
    """A batch: its first rows decode one token each, the others are in their prompts."""

    rows: int  # that decode
    decode: Step | None
    prompts: tuple[Prompt, ...]
    vllm: Mapping[int, object]  # number of KV heads that keep everything -> vLLM's metadata of the prompts


class GroupedSteps:
    """Builds the steps of an engine; `metadata` is vLLM's, of a batch and a number of KV heads."""

    def __init__(
        self,
        groups: HeadGroups,
        policy: Policy,
        buffers: StepBuffers,
        metadata: Callable[[CommonAttentionMetadata, int], object],
    ) -> None:
        self._groups, self._policy, self._buffers, self._metadata = groups, policy, buffers, metadata
        storage = groups.storage
        self._full = {
            len(storage.heads(layer, 0)) for layer in range(groups.model.layers) if storage.windows[0] is None
        } - {0}

    def build(self, common: CommonAttentionMetadata) -> GroupedStep:
        """The step of a batch whose rows of one token come first."""
        self._groups.keep(0, common)
        rows = decode_rows(common)
        if rows == common.num_reqs:
            return GroupedStep(rows, self._decode(common, rows), (), {})
        rest = rows_from(common, rows)
        return GroupedStep(
            rows,
            self._decode(common, rows) if rows else None,
            tuple(self._prompts(common, rows)),
            {heads: self._metadata(rest, heads) for heads in self._full},
        )

    def _decode(self, common: CommonAttentionMetadata, rows: int) -> Step:
        lengths = common.seq_lens[:rows]
        return self._buffers.step(
            PageTable(self._groups.tables[:, :rows], lengths), whole=lengths <= self._policy.dense_up_to
        )

    def _prompts(self, common: CommonAttentionMetadata, rows: int) -> Iterator[Prompt]:
        assert common.positions is not None
        for row in range(rows, common.num_reqs):
            begin, end = common.query_start_loc_cpu[row : row + 2].tolist()
            lengths = (common.positions[begin:end] + 1).to(torch.int32)
            yield Prompt(slice(begin, end), self._groups.tables[:, row : row + 1], lengths)


@dataclass(frozen=True, slots=True)
class Heads:
    """Some KV heads of a layer."""

    kv: Tensor  # [H'] int64, ascending
    query: Tensor  # [H' * G] int64, their query heads

    @classmethod
    def of(cls, kv_heads: list[int], group: int, device: torch.device) -> Heads:
        """The heads with their groups of `group` query heads."""
        kv = torch.tensor(kv_heads, dtype=torch.int64, device=device)
        return cls(kv, (kv[:, None] * group + torch.arange(group, device=device)).flatten())


class GroupedHeads:
    """One layer's heads in their groups."""

    def __init__(self, groups: HeadGroups, layer: int, scratch: Tensor | None) -> None:
        storage, heads, device = groups.storage, groups.model.heads, groups.tables.device
        self.groups, self.scratch = groups, scratch
        # Tokens of a prompt at a time: on the CPU what they leave stays in its caches, on CUDA `scratch` holds as many.
        self.piece = PROMPT_PIECE if scratch is None else max(PROMPT_PIECE, groups.rows)
        self.places = storage.places[layer].to(device)
        full = storage.heads(layer, 0) if storage.windows[0] is None else []
        windowed = [head for head in range(heads.kv_heads) if head not in full]
        self.full = Heads.of(full, heads.queries_per_kv, device) if full else None
        self.full_slots = storage.slots_of(layer, full)
        self.windowed = Heads.of(windowed, heads.queries_per_kv, device) if windowed else None

    def attend_windows(self, prompt: Prompt, layer: SparseLayer, query: Tensor, out: Tensor) -> None:
        """Attend the windowed heads of query [T, Hq, D], tokens of a prompt, to their windows, into theirs of `out`."""
        heads, window = self.windowed, layer.plan.window
        assert heads is not None and window is not None
        windows = window.spans(prompt.lengths)
        windows.clamp_(min=(prompt.lengths * (prompt.lengths <= layer.policy.dense_up_to))[:, None, None])
        kv = PagedKV(layer.kv.key, layer.kv.value, self.places[heads.kv])
        one = windows.shape[1] == 1  # for all heads
        selection = Selection.empty(len(prompt.lengths), 1 if one else len(heads.kv), 0, 32, query.device)
        selection.spans.copy_(windows if one else windows[:, heads.kv])
        tables = prompt.tables.expand(-1, len(prompt.lengths), -1)
        out[:, heads.query], _ = ops.attend(
            query[:, heads.query], kv, PageTable(tables, prompt.lengths), selection, layer.scale, scratch=self.scratch
        )
