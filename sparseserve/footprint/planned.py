"""A policy's plans of a model, made once, and what they read and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparseserve.footprint.groups import RankPlans, plan_ranks, store_planned
from sparseserve.footprint.reads import StepCost, step_cost
from sparseserve.footprint.stores import Memory, Stored, memory_of, needed_bytes
from sparseserve.model import ModelShape
from sparseserve.policies import Policy


@dataclass(frozen=True, slots=True)
class RowMemory:
    """What one row of `length` tokens stores."""

    length: int
    stored: Stored
    needed: int  # bytes, of its heads if each had pages of its own for what it keeps

    @property
    def rounding(self) -> float:
        """What windows that were rounded up and empty slots cost, as a share of what the heads need."""
        return self.stored.over(self.needed)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The plan of every layer, of every tensor-parallel rank; the cache's numbers take `element_bytes`."""

    policy: Policy
    model: ModelShape  # of the first rank
    plans: RankPlans
    element_bytes: int

    @property
    def shapes(self) -> tuple[ModelShape, ...]:
        """The model as each rank has it."""
        return tuple(replace(self.model, rank=rank) for rank in range(self.model.ranks))

    def step(self, length: int, rank: int = 0) -> StepCost:
        """What a step of one row reads on a rank."""
        return step_cost(self.policy, self.plans[rank], self.model, length, self.element_bytes)

    def memory(self, rank: int) -> Memory:
        """The pages that serving gives a rank."""
        shape, frees = self.shapes[rank], self.policy.frees_pages
        storage = store_planned(self.policy, self.plans, shape) if frees else None
        groups = None if storage is None or storage.windows == (None,) else storage
        return memory_of(self.policy, self.plans[rank], shape, self.element_bytes, groups)

    def stored(self, lengths: Sequence[int]) -> tuple[Memory, tuple[RowMemory, ...]]:
        """The pages of the rank with most empty slots, and what rows of `lengths` tokens store in them."""
        rank = self._emptiest()
        memory = self.memory(rank)
        return memory, tuple(RowMemory(length, memory.row(length), self._needed(rank, length)) for length in lengths)

    def _emptiest(self) -> int:
        """The rank whose heads need least of the longest row; it stores as much as the others."""
        return min(range(self.model.ranks), key=lambda rank: self._needed(rank, self.model.max_len))

    def _needed(self, rank: int, length: int) -> int:
        return needed_bytes(self.policy, self.plans[rank], self.model, self.element_bytes, length)


def plan_model(policy: Policy, model: ModelShape, element_bytes: int) -> PlannedModel:
    """Plan every rank; ConfigError when the model does not have the layers asked for."""
    return PlannedModel(policy, replace(model, rank=0), plan_ranks(policy, model), element_bytes)
