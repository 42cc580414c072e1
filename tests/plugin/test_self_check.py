"""A policy that is configured but not what the layers compute stops the server at its start; each link is broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparseserve.errors import SelfCheckError, UnsupportedError
from sparseserve.plugin.support.checks import check_worker
from sparseserve.policies import Policy, Quest, Streaming
from sparseserve.server.views.metrics import check_active
from tests.helpers.plugin import one_process

pytestmark = pytest.mark.vllm
SCRIPT = "tests.helpers.plugin.self_checking"
ENGINE: dict[str, Any] = {"max_model_len": 2048, "block_size": 128, "num_gpu_blocks_override": 60}
SMALL: dict[str, Any] = {"budget_tokens": 256, "min_tokens": 256}
POLICIES = {
    "quest": Quest(**SMALL),
    "streaming": Streaming(sink_tokens=4, recent_tokens=252, min_tokens=128),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_broken_link_is_told(policy: Policy, model: Path) -> None:
    errors, _ = one_process.ask(SCRIPT, model, policy, ENGINE)
    assert errors.pop("nothing") == "" and errors.pop("counted") == "False"
    expected = {
        "kernel computes something else": "off what",
        "kernel attends to everything": "off what",
        "a layer is vLLM's own": "attends by CPUAttentionBackendImpl",
        "a layer has no policy": "without the policy",
    }
    for link, words in expected.items():
        assert words in errors[link], (link, errors[link])
    if not policy.frees_pages:  # such heads have no other path
        assert "does not reach" in errors["rows never reach the policy"]


def test_a_backend_that_was_never_registered_stops_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "none")  # vLLM loads what is named there only
    with pytest.raises(AssertionError, match="SelfCheckError.* attends by CPUAttentionBackendImpl, without the policy"):
        one_process.ask(SCRIPT, model, POLICIES["quest"], ENGINE)


def test_a_policy_needs_our_worker() -> None:
    """Without it nothing would be checked at start, and what requests ask for would be lost."""
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker"))
    with pytest.raises(UnsupportedError, match=r"--worker-cls = .*CPUWorker is refused.*sparseserve serve"):
        check_worker(config)


def test_the_api_server_asks_every_worker() -> None:
    checked: Any = [("sparseserve_self_check", "", "gauge", [("sparseserve_self_check", {"policy": "quest"}, 1.0)])]
    unchecked: Any = [("sparseserve_self_check", "", "gauge", [])]
    check_active("quest", [checked, checked])
    with pytest.raises(SelfCheckError, match="worker 1 of 2 has not checked its attention under quest"):
        check_active("quest", [checked, unchecked])
    with pytest.raises(SelfCheckError, match="worker 0 of 1"):
        check_active("tidal", [checked])
