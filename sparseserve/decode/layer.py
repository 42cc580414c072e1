"""One layer of one decode step."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sparseserve import ops
from sparseserve.policies.base import SparseLayer
from sparseserve.types import Measurement, Role, Step


def decode_layer(layer: SparseLayer, step: Step, query: Tensor, out: Tensor) -> None:
    """Attend `query` [B, Hq, D] to what the policy selects; writes `out` [B, Hq, D]."""
    plan = layer.plan
    selects = plan.role is Role.SELECT
    if selects and not plan.dense_output:
        layer.policy.select(layer, query, step)
    attended = step.attended_dense if plan.dense_output else step.attended
    ops.attend(
        query,
        layer.kv,
        step.table,
        step.attends_to(plan),
        layer.scale,
        out=out,
        lse=step.lse,
        attended=attended[plan.layer],
        scratch=step.scratch,
    )
    layer.policy.after_attend(layer, query, step, out)
    if step.measurement is not None and plan.layer in step.measurement.layers:
        _measure(layer, step, step.measurement, query, out)
    if selects and plan.dense_output:
        layer.policy.select(layer, query, step)


def _measure(layer: SparseLayer, step: Step, measurement: Measurement, query: Tensor, out: Tensor) -> None:
    """Attend once more, to the spans of the measurement, and compare.

    A row under the policy's floor takes the dense output at once, unless it is only to be reported.
    """
    number = layer.plan.layer
    spans = replace(step.everything, spans=measurement.spans[number])
    dense, lse = ops.attend(query, layer.kv, step.table, spans, layer.scale, scratch=step.scratch)
    floor = 0 if layer.policy.recall_action == "report" else layer.policy.recall_floor or 0
    ops.compare_outputs(out, step.lse, dense, lse, measurement.recall[number], measurement.error[number], floor)
