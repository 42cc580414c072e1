"""The policies that the contract holds to its laws, and the model and rows that it holds them on."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparseserve.model import ModelShape
from sparseserve.policies import S2, Dense, Hip, Moa, Policy, Quest, Retrieval, Seer, Streaming, Tidal
from sparseserve.testing.gates import plain_rope, random_gates
from sparseserve.types import Bound, HeadShape, Scope
from tests.helpers.artifact_files import head_map, moa_plan, saved

BUDGET, SINK, RECENT = 128, 5, 19
COMMON: dict[str, Any] = {"budget_tokens": BUDGET, "sink_tokens": SINK, "recent_tokens": RECENT}
QUEST = COMMON | {"unit_tokens": 16, "dense_layers": 1}
HIP = COMMON | {
    "sink_tokens": 8,  # a multiple of the unit
    "wide_layers": 1,
    "wide_budget_tokens": BUDGET,
    "chunk_tokens": (32, 16, 8),
    "stage_tokens": (256, 128),
}
TIDAL = COMMON | {"select_layer": 1, "reselect_layer": 3}
MOA = moa_plan(alpha=[[128, 96, 64, 128]] * 5, beta=[[0, 0.25, 0.5, 0]] * 5)
HEADS = head_map([[1, 1], [1, 0], [0, 0], [0, 1], [0.4, 0.6]])
MODEL = ModelShape(
    name="bed",
    layers=5,
    heads=HeadShape(kv_heads=2, queries_per_kv=2, head_dim=64),
    max_len=448,
    page_size=64,
    rope=partial(plain_rope, 448),
)
GATES = saved(random_gates(MODEL, block_size=16, gate_dim=48))
CASES: dict[str, Policy] = {
    "dense": Dense(),
    "streaming": Streaming(sink_tokens=SINK, recent_tokens=BUDGET - SINK),
    "quest-mean_std": Quest(**QUEST),
    "quest-min_max": Quest(**QUEST | {"bound": Bound.MIN_MAX, "unit_tokens": 32}),
    "tidal": Tidal(**TIDAL),
    "tidal-query_head": Tidal(**TIDAL, scope=Scope.QUERY_HEAD),
    "tidal-all_heads": Tidal(**TIDAL, scope=Scope.ALL_HEADS),
    "tidal-units": Tidal(**TIDAL | {"reselect_layer": [2, 4]}, unit_tokens=16),
    "moa": Moa(artifact=MOA, sink_tokens=SINK, minimum_tokens=32),
    "retrieval": Retrieval(artifact=HEADS, sink_tokens=SINK, recent_tokens=BUDGET - SINK),
    "retrieval-compensate": Retrieval(
        artifact=HEADS, sink_tokens=SINK, recent_tokens=64, compensate=True, kv_memory="shared"
    ),
    "s2": S2(local_blocks=2, stride=2, dense_every=5),
    "s2-query_head": S2(block_tokens=32, local_blocks=4, stride=3, dense_heads=1, scope="query_head"),
    "seer": Seer(**COMMON, artifact=GATES),
    "seer-dense_layers": Seer(**COMMON, artifact=GATES, dense_layers=2),
    "hip": Hip(**HIP),
    "hip-kv_head": Hip(**HIP, scope="kv_head"),
}
LENGTHS = [385, 0, 1, 127, 128, 129, 448, 300]  # empty, short of, at and over the budget, page boundaries
