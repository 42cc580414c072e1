"""What is checked before the engine starts, and how often plans are made for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseserve.config import PolicySource, find_policy
from sparseserve.errors import ConfigError, UnsupportedError
from sparseserve.policies import POLICIES
from sparseserve.server.launch.explain import explain
from sparseserve.server.launch.serve import prepare
from tests.helpers.server.starting import start

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]
BEGIN: dict[str, Callable[[PolicySource, list[str]], object]] = {
    "serve": prepare,
    "explain": lambda source, argv: explain(source, argv, [4096, 8192]),
}


@pytest.mark.parametrize(
    ("policy", "sets", "told"),
    [
        ("tidal", ("reselect_layer=40",), ["--set: reselect_layer = 40", "2 to 5", "6 layers"]),
        ("tidal", ("reselect_layer=1",), ["reselect_layer = 1", "2 to 5"]),
        ("quest", ("dense_layers=7",), ["--set: dense_layers", "6 layers"]),
    ],
)
def test_layers_outside_the_model_are_refused(
    models: dict[str, str], policy: str, sets: tuple[str, ...], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        start(models["llama"], policy=policy, sets=sets)
    assert [words for words in told if words not in str(error.value)] == []


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("policy", "sets"), [("moa", ()), ("moa", ("kv_memory=shared",)), ("quest", ()), ("streaming", ())]
)
def test_every_rank_is_planned_once(
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: str,
    ranks: int,
    policy: str,
    sets: tuple[str, ...],
) -> None:
    """An artifact is read and hashed for every plan."""
    lines = {"alphas": [[0, 0, 256, 256]] * 6, "betas": [[1, 1, 0, 0]] * 6}
    (plan := tmp_path / "plan.json").write_text(json.dumps(lines))
    planned, plans = Counter[int](), POLICIES[policy].plans

    def counted(self: Any, model: Any) -> Any:
        planned[model.rank] += 1
        return plans(self, model)

    monkeypatch.setattr(POLICIES[policy], "plans", counted)
    given = (*sets, f"artifact={plan}") if policy == "moa" else sets
    flags = ["--skip-tokenizer-init", "--block-size", "64", "--tensor-parallel-size", str(ranks)]
    BEGIN[begin](find_policy(policy, given, {}), [models["llama"], *flags])
    assert planned == dict.fromkeys(range(ranks), 1)


@pytest.mark.parametrize("flags", [["--grpc"], ["--worker-cls", "a.B"]])
def test_what_serve_refuses_explain_refuses(models: dict[str, str], flags: list[str]) -> None:
    for begin in BEGIN.values():
        with pytest.raises(UnsupportedError, match=f"{flags[0]} = "):
            begin(find_policy("quest", (), {}), [models["llama"], "--skip-tokenizer-init", *flags])
