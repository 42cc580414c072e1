"""Exchanging the policy of a running engine: tests and benchmarks share one start-up."""

from __future__ import annotations

from typing import Any

from sparseserve.policies import Policy


def rebind(worker: Any, policy: Policy) -> None:
    """Put every attention layer of a vLLM worker under `policy`; give it to `LLM.collective_rpc`.

    The engine must have been started with a policy whose pages have room for the summaries of this one.
    """
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                builder.bind(policy)
