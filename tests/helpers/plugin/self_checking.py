"""A running engine whose check at start-up is repeated after one link was broken on purpose; the errors, by link."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from tests.helpers.plugin import one_process


def main(asked: dict[str, Any]) -> dict[str, str]:
    llm = one_process.start(asked)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    (builder,) = (
        builder
        for groups in worker.model_runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
        if hasattr(builder, "serve")
    )
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from sparseserve import ops
    from sparseserve.errors import SelfCheckError
    from sparseserve.plugin.self_check import check_worker_attention
    from sparseserve.plugin.watch.meter import snapshot
    from sparseserve.types import Selection

    layers = worker.model_runner.compilation_config.static_forward_context
    last = layers[[name for name in layers if name.endswith("attn")][-1]]
    attend = ops.attend

    def everything(query: Any, kv: Any, table: Any, selection: Any, scale: float, **options: Any) -> Any:
        full = Selection.empty(len(table.seq_lens), selection.spans.shape[1], 0, 32)
        full.spans.copy_(table.seq_lens[:, None, None])
        return attend(query, kv, table, full, scale, **options)

    def other_keys(query: Any, kv: Any, *arguments: Any, **options: Any) -> Any:
        return attend(query.roll(1, -1), kv, *arguments, **options)

    broken: dict[str, AbstractContextManager[Any]] = {
        "nothing": patch.dict({}),
        "kernel computes something else": patch.object(ops, "attend", other_keys),
        "kernel attends to everything": patch.object(ops, "attend", everything),
        "rows never reach the policy": patch.object(type(builder), "batch", all_in_their_prompt(builder)),
        "a layer is vLLM's own": patch.object(last, "impl", object.__new__(CPUAttentionBackendImpl)),
        "a layer has no policy": patch.object(last.impl, "policy", None),
    }

    def counted() -> dict[str, float]:
        return {f"{s}{labels}": value for *_, samples in snapshot() for s, labels, value in samples if "rows" in s}

    before, errors = counted(), {}
    for link, breaking in broken.items():
        errors[link] = ""
        with breaking:
            try:
                check_worker_attention(worker)
            except SelfCheckError as error:
                errors[link] = str(error)
    return errors | {"counted": str(counted() != before)}


def all_in_their_prompt(builder: Any) -> Any:
    """The builder's view of a batch, as if no row decoded."""
    original = type(builder).batch

    def batch(self: Any, common: Any) -> Any:
        common.is_prefilling[:] = True
        return original(self, common)

    return batch


if __name__ == "__main__":
    one_process.answer(main)
