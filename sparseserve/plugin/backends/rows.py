"""Once per step: which rows decode under the policy, and which are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True, slots=True)
class RowSplit:
    """The rows of a batch by the path they take."""

    sparse: Tensor  # [B] int64, decode rows longer than the policy's threshold
    dense: Tensor  # [R - B] int64, all others
    short: int  # decode rows among the others, dense for their length alone
    asked: Tensor  # [R] bool, longer ones that are dense because their requests or the guard want it
    before: Tensor  # [R] int32, tokens of every row before the step
    after: Tensor  # [R] int32, tokens with those of the step

    @property
    def prefill(self) -> int:
        """Rows that are still in their prompt."""
        return self.dense.shape[0] - self.short - int(self.asked.sum())


def split_rows(common: CommonAttentionMetadata, dense_up_to: int | Tensor, dense: Tensor | None = None) -> RowSplit:
    """Decode rows of more than `dense_up_to` tokens ([R] int32, or one number) against all others.

    Rows that are `dense` [R] bool are among the others at any length. A prompt's last chunk of one token is prefill:
    the answer must not depend on where chunks end.
    """
    query_lens = common.query_start_loc_cpu.diff()
    lengths = common.seq_lens_cpu_upper_bound
    assert common.is_prefilling is not None and lengths is not None
    decode = (query_lens == 1) & ~common.is_prefilling
    long = decode & (lengths > dense_up_to)
    asked = torch.zeros_like(long) if dense is None else long & dense
    sparse = long & ~asked
    return RowSplit(
        sparse=sparse.nonzero().squeeze(1),
        dense=(~sparse).nonzero().squeeze(1),
        short=int((decode & ~long).sum()),
        asked=asked,
        before=lengths - query_lens,
        after=lengths,
    )


def decode_rows(common: CommonAttentionMetadata) -> int:
    """How many rows at the start of the batch have at most one query token; all rows of a captured decode graph."""
    return int((common.query_start_loc_cpu.diff() <= 1).cumprod(0).sum())


def real_rows(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """The metadata without the rows that pad a captured graph: they have no query token."""
    rows = int((common.query_start_loc_cpu.diff() > 0).sum())
    return common.unpadded(int(common.query_start_loc_cpu[rows]), rows)


def rows_from(common: CommonAttentionMetadata, first: int) -> CommonAttentionMetadata:
    """The metadata of the rows from `first` on, which have one query token each before them; nothing is gathered."""
    assert common.positions is not None and common.is_prefilling is not None
    assert common.seq_lens_cpu_upper_bound is not None
    return replace(
        common,
        query_start_loc=common.query_start_loc[first:] - first,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - first,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - first,
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[first:],
        positions=common.positions[first:],
        is_prefilling=common.is_prefilling[first:],
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[first:],
    )


def token_rows(common: CommonAttentionMetadata, rows: Tensor) -> Tensor:
    """Indices [T] int64 of the query tokens of `rows`, in order."""
    starts = common.query_start_loc_cpu
    return torch.cat([torch.arange(int(starts[row]), int(starts[row + 1])) for row in rows.tolist()])


def take_rows(common: CommonAttentionMetadata, rows: Tensor, tokens: Tensor) -> CommonAttentionMetadata:
    """The metadata of a batch made of `rows` alone, whose query tokens are `tokens`."""
    query_lens = common.query_start_loc_cpu.diff()[rows]
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).to(torch.int32)
    seq_lens = common.seq_lens[rows]
    return replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=rows.shape[0],
        num_actual_tokens=tokens.shape[0],
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[tokens],
    )
