"""What `sparseserve serve` says before the engine starts."""

from __future__ import annotations

import pytest

from sparseserve.server.launch.description import ranges
from tests.helpers.server.starting import start

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]


def test_the_summary_says_what_the_policy_will_do(models: dict[str, str]) -> None:
    summary = start(models["llama"], policy="tidal", sets=("reselect_layer=4", "budget_tokens=2048")).description
    for told in ("policy=tidal", "budget_tokens=2048", "dense 0-1, select 2 4, reuse 3 5", "CPU_ATTN", "runner V1"):
        assert told in summary
    assert "75.0% of the KV cache per step at 8192 tokens" in summary  # (4 layers + 2 layers / 4) / 6
    assert "stores 100.0% of dense attention's (1.00x less)" in summary


@pytest.mark.parametrize(
    ("policy", "sets", "told"),
    [
        # 9 of 64 pages of 128 tokens
        ("streaming", (), "stores 14.1% of dense attention's (7.11x less); rounded windows and empty slots cost 0.0%"),
        ("streaming", ("kv_memory=shared",), "stores 100.0% of dense attention's (1.00x less)"),
        ("quest", (), "stores 103.1% of dense attention's (0.97x less)"),  # two vectors for 32 tokens
    ],
)
def test_the_summary_says_what_rows_store(
    models: dict[str, str], policy: str, sets: tuple[str, ...], told: str
) -> None:
    assert told in start(models["llama"], policy=policy, sets=sets).description


def test_layers_are_printed_as_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2 4 6-7"
