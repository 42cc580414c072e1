"""What gates learn from: the queries, pooled keys and block maxima of the dense model, one document at a time.

The training target is SeerAttention-R's (arXiv 2506.08889, section 3.2): the largest attention weight of every block,
the maximum over a KV head's query heads, over the blocks before the query's own, made to sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseserve.calibration.attention import ROWS, Attention, hooked
from sparseserve.calibration.subject import Subject
from sparseserve.reference.gate import pool, unrotate


@dataclass(frozen=True, slots=True)
class LayerFeatures:
    """What one layer shows of one document; N blocks lie whole in it."""

    query: Tensor  # [R, Hq, D] before rotation
    pooled: Tensor  # [H, N, 3D] fp32, the keys of each block before rotation
    target: Tensor  # [R, H, N] fp32, sums to 1 over the blocks before the row's own
    mass: Tensor  # [R, H, N] fp32, the attention weights of each of these blocks, summed, mean over the group
    mean_key: Tensor  # [R, H, N] fp32, scale q.k of the mean of a block's rotated keys, the best of the group


def draw_rows(tokens: int, count: int, seed: int) -> Tensor:
    """At most `count` positions [R] int64, ascending, from the last half of a document of `tokens` tokens."""
    first = tokens // 2
    drawn = torch.randperm(tokens - first, generator=torch.Generator().manual_seed(seed))[:count]
    return first + drawn.sort().values


@torch.no_grad()
def features(subject: Subject, ids: Sequence[int], rows: Tensor, block: int, unrope: Tensor) -> list[LayerFeatures]:
    """The features of every layer from one pass of the model."""
    found: list[LayerFeatures] = []

    def look(attention: Attention) -> None:
        found.append(layer_features(attention, rows, block, unrope))

    with hooked(look):
        subject.model(subject.tensor(ids), logits_to_keep=1, use_cache=False)
    return found


def layer_features(attention: Attention, rows: Tensor, block: int, unrope: Tensor) -> LayerFeatures:
    """The features of one layer: `rows` [R] ascending positions, `unrope` [T, D] undoes the model's rotation."""
    heads, keys, dim = attention.key.shape
    whole = keys // block
    rotated = attention.key[:, : whole * block].float()
    plain = unrotate(rotated, unrope[: whole * block]).view(heads, whole, block, dim)
    means = rotated.view(heads, whole, block, dim).mean(2)  # [H, N, D]
    query = attention.query[:, rows - attention.start].transpose(0, 1).float()  # [R, Hq, D]
    grouped = query.reshape(len(rows), heads, attention.group, dim)
    target, mass = (torch.cat(parts) for parts in zip(*_targets(attention, rows, block, whole), strict=True))
    return LayerFeatures(
        query=unrotate(query, unrope[rows][:, None]),
        pooled=pool(plain),
        target=target,
        mass=mass,
        mean_key=(torch.einsum("rhgd,hnd->rhgn", grouped, means) * attention.scale).amax(2),
    )


def _targets(attention: Attention, rows: Tensor, block: int, blocks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Target and mass [r, H, N] of a block row of the attention matrix at a time."""
    for some in torch.split(rows, ROWS):
        logits = attention.logits_at(some)
        logs = logits - logits.logsumexp(-1, keepdim=True)
        room = blocks * block - logs.shape[-1]
        split = pad(logs, (0, room), value=-torch.inf).view(-1, attention.group, len(some), blocks, block)
        later = torch.arange(blocks, device=some.device) >= (some // block)[:, None]
        split = split.masked_fill(later[..., None], -torch.inf)  # [H, G, r, N, block]
        target = split.amax(-1).amax(1).softmax(-1)  # in logarithms, so that nothing underflows
        mass = split.exp().sum(-1).mean(1)
        yield target.transpose(0, 1), mass.transpose(0, 1)
