"""What the metrics of this process, as of a worker, say."""

from __future__ import annotations

from sparseserve.plugin.watch.metrics import WORKER


def value(name: str, **labels: str) -> float:
    """A sample by its whole name, which must be there."""
    found = WORKER.get_sample_value(name, labels)
    assert found is not None, f"{name} {labels}"
    return found


def recall_of(policy: str, layer: int) -> tuple[float, float]:
    """Recall of the rows measured so far in a layer, their sum and their number."""
    total, rows = (
        value(f"sparseserve_layer_recall_{part}", policy=policy, layer=str(layer)) for part in ("sum", "count")
    )
    return total, rows


def tokens_of(policy: str, role: str) -> list[float]:
    """KV tokens attended to and resident so far."""
    return [value(f"sparseserve_kv_tokens_{kind}_total", policy=policy, role=role) for kind in ("attended", "resident")]
