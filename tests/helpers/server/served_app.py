"""vLLM's own app with our routes, and workers that say what a test wants."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sparseserve import environment
from sparseserve.config import find_policy
from sparseserve.server.launch.flags import engine_config
from sparseserve.server.launch.serve import prepare

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.tasks import SupportedTask

LAYERS, KV_HEADS, LONGEST = 6, 2, 8192
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": LONGEST,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 320,
}
INFO = {"policy": "quest", "backend": "CPU_ATTN", "runner": "V1", "isa": "avx2", "version": "0.1.0"}
GAUGES: dict[str, list[tuple[dict[str, str], float]]] = {
    "info": [(INFO, 1)],
    "self_check": [({"policy": "quest"}, 1)],
    "recall_floor": [({"policy": "quest"}, 0.9)],
    "kv_bytes": [
        ({"kind": "full"}, 3e6),
        ({"kind": "window"}, 0),
        ({"kind": "summaries"}, 1e5),
        ({"kind": "dense_equivalent"}, 4e6),
    ],
    "kv_capacity_gain": [({}, 0.8)],
}
COUNTERS: dict[str, list[tuple[dict[str, str], float]]] = {
    "kv_tokens_attended": [({"policy": "quest", "role": "dense"}, 800), ({"policy": "quest", "role": "select"}, 200)],
    "kv_tokens_resident": [({"policy": "quest", "role": "dense"}, 800), ({"policy": "quest", "role": "select"}, 1600)],
    "decode_rows": [({"policy": "quest"}, 40)],
    "dense_rows": [
        ({"policy": "quest", "reason": reason}, rows)
        for reason, rows in (("short", 7), ("prefill", 3), ("request", 2), ("guard", 1))
    ],
    "under_floor": [({"policy": "quest", "action": "widen"}, 4)],
    "budget_widened": [({"policy": "quest"}, 5)],
    "dense_fallback": [({"policy": "quest", "reason": "budget"}, 2)],
}
RECALLS = {"10-11": [0.95, 0.97], "2-9": [0.5, 0.8], "0-1": []}  # in no order
Snapshot = Any


def told(registry: CollectorRegistry) -> Snapshot:
    """A registry as a worker's snapshot."""
    return [
        (metric.name, metric.documentation, metric.type, [(s.name, s.labels, s.value) for s in metric.samples])
        for metric in registry.collect()
    ]


def busy_worker(times: int = 1) -> Snapshot:
    """A worker that measures recall, under the floor in layers 2 to 9; it counted everything so many times."""
    registry = CollectorRegistry()
    for cls, metrics, factor in ((Gauge, GAUGES, 1), (Counter, COUNTERS, times)):
        for name, values in metrics.items():
            metric: Any = cls(f"sparseserve_{name}", name, list(values[0][0]), registry=registry)
            for labels, value in values:
                (metric.labels(**labels) if labels else metric).inc(factor * value)
    names, edges = ["policy", "layers"], (0.5, 0.9, 0.99)
    recall = Histogram("sparseserve_attention_recall", "recall", names, registry=registry, buckets=edges)
    error = Histogram("sparseserve_attention_output_error", "error", names, registry=registry, buckets=edges)
    for layers, observed in RECALLS.items():
        kept, lost = recall.labels("quest", layers), error.labels("quest", layers)
        for value in observed * times:
            kept.observe(value)
            lost.observe(1 - value)
    return told(registry)


class Workers:
    """The engine as the routes see it; `snapshots` gives what every worker says."""

    def __init__(self, vllm_config: VllmConfig, snapshots: Callable[[], list[Snapshot]]) -> None:
        self.vllm_config, self._snapshots = vllm_config, snapshots

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Snapshot]:
        assert method == "sparseserve_stats"
        return self._snapshots()


def configured(
    folder: Path, *flags: str, policy: str = "quest", sets: tuple[str, ...] = ()
) -> tuple[Namespace, VllmConfig]:
    """vLLM's arguments and configuration of a server, of a model without weights in `folder`."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)  # spares a subprocess of several seconds
    (folder / "config.json").write_text(json.dumps(CONFIG))
    argv = [str(folder), "--served-model-name", "tiny", "--skip-tokenizer-init", *flags]
    args = prepare(find_policy(policy, sets, {}), argv).args
    return args, engine_config(args)


@contextmanager
def served(
    args: Namespace,
    engine: Workers | None,
    page: str = "0",
    plugins: Sequence[str] = ("sparseserve_metrics", "sparseserve_routes"),
    tasks: tuple[SupportedTask, ...] = ("generate",),
) -> Iterator[FastAPI]:
    """vLLM's app with our plugins."""
    from vllm.entrypoints.launchers.app import build_app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", ",".join(plugins))
        patch.setenv(environment.PAGE, page)
        app = build_app(args, tasks, None if engine is None else engine.vllm_config.model_config)
    for plugin in app.state.endpoint_plugins:
        asyncio.run(plugin.init_state(engine, app.state, args))
    yield app
    REGISTRY.unregister(app.state.sparseserve_metrics.metrics)
