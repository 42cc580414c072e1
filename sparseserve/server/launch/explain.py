"""What `serve` would read and store of the KV cache, told from vLLM's configuration without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparseserve.config import PolicySource
from sparseserve.errors import ConfigError
from sparseserve.footprint.planned import RowMemory
from sparseserve.footprint.reads import StepCost, token_bytes
from sparseserve.footprint.stores import Memory
from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.server.launch.checks import check
from sparseserve.server.launch.flags import parse

LENGTHS = (4096, 32768, 131072)  # tokens, as far as the model goes


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a policy does with a model."""

    policy: Policy
    model: ModelShape
    kv_bytes: int  # of one token in one layer, on one rank
    page_state_bytes: int  # of one page in one layer, on one rank
    steps: tuple[StepCost, ...]
    memory: Memory  # of the rank with most empty slots
    rows: tuple[RowMemory, ...]  # of the same lengths as the steps


def explain(source: PolicySource, argv: list[str], lengths: Sequence[int]) -> Explanation:
    """Check `argv`, the arguments of `vllm serve`, as `serve` does, and predict steps at `lengths`."""
    planned = check(source, argv, parse(argv)).planned
    policy, model, element_bytes = planned.policy, planned.model, planned.element_bytes
    lengths = _lengths(lengths, model)
    return Explanation(
        policy,
        model,
        token_bytes(model.heads, element_bytes),
        policy.page_state_bytes(model.heads, model.page_size, element_bytes),
        tuple(planned.step(length) for length in lengths),
        *planned.stored(lengths),
    )


def _lengths(asked: Sequence[int], model: ModelShape) -> Sequence[int]:
    for length in asked:
        if not 0 < length <= model.max_len:
            allowed = f"1 to {model.max_len} tokens, the context of {model.name}"
            raise ConfigError("--lengths", length, allowed, remedy="give --max-model-len, or other lengths")
    return asked or [length for length in LENGTHS if length < model.max_len] + [model.max_len]
