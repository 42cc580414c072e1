"""What a server is about to do, in a line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparseserve import ops
from sparseserve.config import to_dict
from sparseserve.footprint.planned import PlannedModel
from sparseserve.types import Role
from sparseserve.vllm_version import runner_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def describe(config: VllmConfig, planned: PlannedModel) -> str:
    """What the policy will do, in one line."""
    policy, (plans, *_), length = planned.policy, planned.plans, planned.model.max_len
    roles = {role: [plan.layer for plan in plans if plan.role is role] for role in Role}
    attended = sum(policy.expected_tokens(plan, length) for plan in plans)
    backend = f"CPU_ATTN ({ops.isa()})" if config.device_config.device_type == "cpu" else "CUSTOM (cuda)"
    parts = [
        " ".join(f"{key}={value}" for key, value in to_dict(policy).items()),
        "layers " + ", ".join(f"{role.value} {ranges(layers)}" for role, layers in roles.items() if layers),
        f"backend {backend}",
        f"runner {runner_of(config)}",
        f"attends to {attended / (length * len(plans)):.1%} of the KV cache per step at {length} tokens",
        _stored(planned),
    ]
    return "sparseserve: " + "; ".join(parts)


def _stored(planned: PlannedModel) -> str:
    """What the longest row stores, on the rank with most empty slots."""
    _, (row,) = planned.stored([planned.model.max_len])
    waste = f"; rounded windows and empty slots cost {row.rounding:.1%}" if planned.policy.frees_pages else ""
    return f"stores {1 / row.stored.ratio:.1%} of dense attention's ({row.stored.ratio:.2f}x less){waste}"


def ranges(layers: Iterable[int]) -> str:
    """Layers as `0-1 4 6-9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
