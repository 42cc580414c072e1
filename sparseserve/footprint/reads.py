"""What a policy reads in a decode step, predicted from the plan of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparseserve.model import ModelShape
from sparseserve.policies import Policy
from sparseserve.types import HeadShape, LayerPlan, Role


@dataclass(frozen=True, slots=True)
class RoleCost:
    """The layers of one role in one step of one row, on one rank."""

    role: Role
    layers: int
    tokens: float  # attended to by a layer, mean over heads
    kv_bytes: float  # keys and values of these tokens, all layers
    scored_bytes: float  # read to choose tokens or to make up for dropped ones, all layers

    @property
    def bytes(self) -> float:
        """All that the layers read of the cache."""
        return self.kv_bytes + self.scored_bytes


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step of one row of `length` tokens, on one rank."""

    length: int
    roles: tuple[RoleCost, ...]
    dense_bytes: float  # that dense attention reads

    @property
    def bytes(self) -> float:
        """All that the policy reads of the cache."""
        return sum(role.bytes for role in self.roles)

    @property
    def ratio(self) -> float:
        """How many times less than dense attention."""
        return self.dense_bytes / self.bytes


def token_bytes(heads: HeadShape, element_bytes: int) -> int:
    """Bytes of one token's keys and values in one layer's cache."""
    return 2 * heads.kv_heads * heads.head_dim * element_bytes


def step_cost(
    policy: Policy, plans: Sequence[LayerPlan], model: ModelShape, length: int, element_bytes: int
) -> StepCost:
    """Predict a step of one row of `length` tokens whose cache holds numbers of `element_bytes`."""
    by_role = [[plan for plan in plans if plan.role is role] for role in Role]
    roles = tuple(_role_cost(policy, layers, model, length, element_bytes) for layers in by_role if layers)
    dense = len(plans) * length * token_bytes(model.heads, element_bytes)
    return StepCost(length, roles, dense)


def _role_cost(
    policy: Policy, plans: Sequence[LayerPlan], model: ModelShape, length: int, element_bytes: int
) -> RoleCost:
    dense = length <= policy.dense_up_to
    tokens = [length if dense else policy.expected_tokens(plan, length) for plan in plans]
    scored = [0 if dense else policy.scored_bytes(plan, model, length, element_bytes) for plan in plans]
    # Query heads that choose for themselves share no read.
    streams = max(1, model.heads.selection_heads(policy.head_scope) // model.heads.kv_heads)
    read = [count if dense or plan.dense_output else count * streams for plan, count in zip(plans, tokens, strict=True)]
    return RoleCost(
        role=plans[0].role,
        layers=len(plans),
        tokens=sum(tokens) / len(plans),
        kv_bytes=sum(read) * token_bytes(model.heads, element_bytes),
        scored_bytes=sum(scored),
    )
