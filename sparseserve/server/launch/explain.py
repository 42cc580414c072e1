"""What `serve` would read and store of the KV cache, told from vLLM's configuration without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparseserve.config import PolicySource
from sparseserve.errors import ConfigError
from sparseserve.footprint.reads import StepCost, step_cost, token_bytes
from sparseserve.footprint.stores import Memory, Stored, emptiest_rank, needed_bytes, predict_memory
from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.server.launch.checks import check_supported, model_dtype, model_shape, plan_layers
from sparseserve.server.launch.serve import engine_config, parse, platform_flags, vllm_errors

LENGTHS = (4096, 32768, 131072)  # tokens, as far as the model goes


@dataclass(frozen=True, slots=True)
class RowMemory:
    """What one row of `length` tokens stores on the rank with most empty slots."""

    length: int
    stored: Stored
    needed: int  # bytes, of its heads if each had pages of its own for what it keeps

    @property
    def rounding(self) -> float:
        """What windows that were rounded up and empty slots cost, as a share of what the heads need."""
        return self.stored.over(self.needed)


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
    with vllm_errors():
        args = parse(argv)
    policy = source.policy(args.model)
    with vllm_errors():
        args = parse([*argv, *platform_flags(policy, args)])
        config = engine_config(args)
    check_supported(config, policy)
    model = model_shape(config)
    try:
        plans = plan_layers(config, policy, model)
    except ConfigError as error:
        raise source.locate(error, args.model) from None
    element_bytes = model_dtype(config).itemsize
    rank = emptiest_rank(policy, model, element_bytes)
    own = policy.plans(rank)
    memory = predict_memory(policy, own, rank, element_bytes)
    lengths = _lengths(lengths, model)
    needed = [needed_bytes(policy, own, rank, element_bytes, length) for length in lengths]
    return Explanation(
        policy,
        model,
        token_bytes(model.heads, element_bytes),
        policy.page_state_bytes(model.heads, model.page_size, element_bytes),
        tuple(step_cost(policy, plans, model, length, element_bytes) for length in lengths),
        memory,
        tuple(RowMemory(length, memory.row(length), alone) for length, alone in zip(lengths, needed, strict=True)),
    )


def _lengths(asked: Sequence[int], model: ModelShape) -> Sequence[int]:
    for length in asked:
        if not 0 < length <= model.max_len:
            allowed = f"1 to {model.max_len} tokens, the context of {model.name}"
            raise ConfigError("--lengths", length, allowed, remedy="give --max-model-len, or other lengths")
    return asked or [length for length in LENGTHS if length < model.max_len] + [model.max_len]
