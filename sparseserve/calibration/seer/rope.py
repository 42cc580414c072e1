"""The rotary embedding of a transformers model as gates need it: undone, and at the gate's own dim."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention, hooked
from sparseserve.calibration.subject import Subject
from sparseserve.errors import Problem, UnsupportedError
from sparseserve.reference.gate import unrotate

TYPES = ("default", "linear", "llama3", "yarn")  # of rope_parameters, the same at every length and at every dim
PROBE = 64  # tokens
TOLERANCE = 0.05  # of the largest number; bfloat16 keys differ by 0.01


def rotations(subject: Subject, tokens: int, gate_dim: int) -> tuple[Tensor, Tensor]:
    """cos then sin of positions 0 to `tokens` - 1: what undoes the model's rotation [T, D] and the gate's own [T, E].

    Both fp32 and as the policy seer serves them: yarn's amplitude is undone in the first and left in the second.
    UnsupportedError unless the model rotates the whole head, in halves, by angles that depend on the position alone.
    """
    rotary = _rotary(subject)
    table = _table(rotary, tokens, subject.shape.heads.head_dim)
    cos, sin = table.chunk(2, -1)
    unrope = table / (cos * cos + sin * sin).repeat(1, 2)
    _probe(subject, unrope)
    config = copy(rotary.config)
    config.head_dim = gate_dim
    return unrope, _table(type(rotary)(config).to(subject.device), tokens, gate_dim)


def _rotary(subject: Subject) -> Any:
    found = [module for module in subject.model.modules() if hasattr(module, "inv_freq") and hasattr(module, "config")]
    if len(found) != 1:
        raise _refused(f"{len(found)} rotary embeddings")
    kind = (found[0].config.rope_parameters or {}).get("rope_type")
    if kind not in TYPES:
        raise _refused(f"rope_type {kind}")
    return found[0]


def _table(rotary: Any, tokens: int, dim: int) -> Tensor:
    """cos and sin [T, dim] fp32; transformers has every angle twice, for either half."""
    positions = torch.arange(tokens, device=rotary.inv_freq.device)
    cos, sin = rotary(positions.float(), positions[None])
    if cos.shape[-1] != dim:
        raise _refused(f"a rotation of {cos.shape[-1]} of {dim} dims")
    return torch.cat([cos[0, :, : dim // 2], sin[0, :, : dim // 2]], -1)


@torch.no_grad()
def _probe(subject: Subject, unrope: Tensor) -> None:
    """A token's keys in the first layer do not depend on its position, once they are un-rotated."""
    seen: list[Tensor] = []

    def look(attention: Attention) -> None:
        if attention.layer == 0:
            seen.append(unrotate(attention.key.float(), unrope[: attention.key.shape[1]]))

    with hooked(look):
        subject.model(subject.tensor([1] * min(PROBE, len(unrope))), logits_to_keep=1)
    keys = seen[0]
    if (keys - keys[:, :1]).abs().max() > TOLERANCE * keys.abs().max():
        raise _refused("another rotation or other position embeddings")


def _refused(found: str) -> UnsupportedError:
    allowed = f"one rotary embedding of the whole head, in halves, of the types {', '.join(TYPES)}"
    return UnsupportedError(Problem("position embedding", found, allowed, remedy="take a policy without gates"))
