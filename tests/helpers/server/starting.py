"""A server that is checked and not started."""

from __future__ import annotations

from sparseserve.config import find_policy
from sparseserve.server.launch.serve import Launch, prepare


def start(model: str, *flags: str, policy: str = "quest", sets: tuple[str, ...] = ()) -> Launch:
    """What `sparseserve serve` would start for a model without weights."""
    return prepare(find_policy(policy, sets, {}), [model, "--skip-tokenizer-init", *flags])
