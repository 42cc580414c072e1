"""Everything, through our own kernels: the control."""

from __future__ import annotations

from typing import ClassVar

from sparseserve.model import ModelShape
from sparseserve.policies.base import Policy
from sparseserve.types import LayerPlan, Role


class Dense(Policy):
    """Attends to every token."""

    name: ClassVar[str] = "dense"
    description: ClassVar[str] = "Every token, through the project's own kernels: the control."
    is_sparse: ClassVar[bool] = False

    def plans(self, model: ModelShape) -> tuple[LayerPlan, ...]:
        return tuple(LayerPlan(layer, Role.DENSE, dense_output=True) for layer in range(model.layers))
