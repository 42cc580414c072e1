"""One layer of one decode step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparseserve import ops
from sparseserve.policies.base import Policy
from sparseserve.types import LayerPlan, PagedKV, Role, Step


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """A layer's policy and plan, its cache and its summaries, bound once the cache exists."""

    policy: Policy
    plan: LayerPlan
    kv: PagedKV
    summary: Tensor | None  # [M, ...], in the tails of the pages
    scale: float


def decode_layer(layer: SparseLayer, step: Step, query: Tensor, out: Tensor) -> None:
    """Attend `query` [B, Hq, D] to what the policy selects; writes `out` [B, Hq, D]."""
    plan = layer.plan
    selects = plan.role is Role.SELECT
    if selects and not plan.dense_output:
        layer.policy.select(query, layer.kv, layer.summary, plan, step, layer.scale)
    attended = step.attended_dense if plan.dense_output else step.attended
    ops.attend(
        query,
        layer.kv,
        step.table.pages,
        step.table.seq_lens,
        step.attends_to(plan),
        layer.scale,
        out=out,
        lse=step.lse,
        attended=attended[plan.layer],
        scratch=step.scratch,
    )
    if step.recall is not None and not plan.dense_output:
        _measure_recall(layer, step, query, step.recall[plan.layer])
    layer.policy.after_attend(query, layer.kv, layer.summary, plan, step, layer.scale, out)
    if selects and plan.dense_output:
        layer.policy.select(query, layer.kv, layer.summary, plan, step, layer.scale)


def _measure_recall(layer: SparseLayer, step: Step, query: Tensor, recall: Tensor) -> None:
    """Write the share of the softmax mass that the latest attend kept, the mean over query heads, into `recall` [B].

    exp(lse - lse of everything); a row of padding has no mass and gives NaN.
    """
    table = step.table
    _, everything = ops.attend(
        query, layer.kv, table.pages, table.seq_lens, step.everything, layer.scale, scratch=step.scratch
    )
    recall.copy_((step.lse - everything).exp().mean(1))
