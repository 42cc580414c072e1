"""`sparseserve explain`: predictions without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sparseserve.cli import app
from sparseserve.testing.plans import write_head_map

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models")]


def explain(model: str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["explain", model, "--skip-tokenizer-init", *flags], env={"COLUMNS": "200"})


def explained(model: str, *flags: str) -> Any:
    result = explain(model, *flags, "--json")
    return json.loads(result.output[result.output.index("{") :])


def test_every_role_and_length_is_told(models: dict[str, str]) -> None:
    told = explained(models["llama"], "--policy", "quest", "--lengths", "4096,8192", "--block-size", "64")
    assert (told["page_tokens"], told["kv_bytes_per_token"]) == (64, 6 * 2 * 2 * 64 * 2)
    assert told["page_state_bytes_per_page"] == 6 * 2 * 2 * (2 * 64 * 2)  # layers, heads, units, two bf16 vectors
    assert [step["length"] for step in told["steps"]] == [4096, 8192]
    long = told["steps"][1]
    assert [(role["role"], role["layers"], role["tokens"]) for role in long["roles"]] == [
        ("dense", 2, 8192),
        ("select", 4, 1024),
    ]
    assert long["bytes"] == sum(role["kv_bytes"] + role["scored_bytes"] for role in long["roles"])
    assert long["ratio_to_dense"] == pytest.approx(8192 * told["kv_bytes_per_token"] / long["bytes"])


def test_without_lengths_it_goes_as_far_as_the_model(models: dict[str, str]) -> None:
    assert [step["length"] for step in explained(models["llama"], "--policy", "dense")["steps"]] == [4096, 8192]


def test_the_table_says_the_same(models: dict[str, str]) -> None:
    output = explain(models["llama"], "--policy", "tidal", "--set", "reselect_layer=4").output
    for told in ("8192", "2 dense", "2 select", "2 reuse", "less than dense", "units of 1 read up to 32 times"):
        assert told in output


def test_heads_that_keep_the_same_are_told_with_their_pages(models: dict[str, str], tmp_path: Path) -> None:
    heads = write_head_map(tmp_path / "heads.json", {(0, 0), (1, 1), (2, 0)})
    flags = ["--policy", "retrieval", "--set", f"artifact={heads}", "--set", "recent_tokens=192", "--block-size", "64"]
    told = explained(models["llama"], *flags, "--lengths", "1024,8192")
    memory, (short, long) = told["memory"], told["memory"]["rows"]
    assert (told["dense_up_to"], memory["kv_memory"], memory["page_slots"]) == (1024, "per_head", 3)
    assert short["ratio_to_dense"] == 1 and short["rounding_cost"] == 0  # 12 heads in four page tables
    assert [group["first_and_last_tokens"] for group in short["groups"]] == [None, None]
    full, window = long["groups"]
    assert (full["kv_heads"], full["pages"], full["empty_slots"]) == (3, 128, 0)
    assert (window["kv_heads"], window["page_tables"], window["pages"]) == (9, 3, 3 * 4)
    assert window["first_and_last_tokens"] == [4, 192] and window["slots"] == 9
    assert long["bytes"] == full["bytes"] + window["bytes"] == 140 * memory["page_bytes"]
    assert long["dense_bytes"] == 8192 * told["kv_bytes_per_token"]
    assert long["ratio_to_dense"] == pytest.approx(512 / 140)
    output = explain(models["llama"], *flags).output
    for words in (
        "first 4, last 192",
        "0 of 9",
        "3.66x",
        "3 slots",
        "cost 0.0%",
        "1024 tokens attend to everything and",
    ):
        assert words in output


def test_unlike_ranks_are_told_by_the_one_with_most_empty_slots(models: dict[str, str], tmp_path: Path) -> None:
    lines = {"alphas": [[0, 0, 256, 256]] * 6, "betas": [[1, 1, 0, 0]] * 6}  # all windows on the second rank
    (plan := tmp_path / "plan.json").write_text(json.dumps(lines))
    flags = ["--policy", "moa", "--set", f"artifact={plan}", "--block-size", "64", "--tensor-parallel-size", "2"]
    told = explained(models["llama"], *flags, "--lengths", "8192")
    (row,) = told["memory"]["rows"]
    full, window = row["groups"]
    assert (full["kv_heads"], full["empty_slots"], window["kv_heads"]) == (0, told["memory"]["page_slots"], 6)
    needed = 6 * 4 * 64 * 2 * 64 * 2  # a page of the sink and three of the window
    assert row["rounding_cost"] == pytest.approx(row["bytes"] / needed - 1) and row["rounding_cost"] > 10


def test_windows_of_many_lengths_are_rounded_up(models: dict[str, str], tmp_path: Path) -> None:
    betas = [[0.02 * (layer + 1), 0.02 * (layer + 1), 0.1, 0.1] for layer in range(6)]
    (plan := tmp_path / "plan.json").write_text(json.dumps({"alphas": [[128] * 4] * 6, "betas": betas}))
    told = explained(models["llama"], "--policy", "moa", "--set", f"artifact={plan}", "--lengths", "8192")
    (row,) = told["memory"]["rows"]
    assert len(row["groups"]) <= 3 and row["rounding_cost"] > 0
    assert sum(group["kv_heads"] for group in row["groups"]) == 12


@pytest.mark.parametrize(
    ("policy", "ratio"), [("quest", 32 / 33), ("dense", 1.0), ("streaming --set kv_memory=shared", 1.0)]
)
def test_shared_memory_is_told_in_a_line(models: dict[str, str], policy: str, ratio: float) -> None:
    (row,) = explained(models["llama"], "--policy", *policy.split(), "--lengths", "8192")["memory"]["rows"]
    assert row["ratio_to_dense"] == pytest.approx(ratio) and row["rounding_cost"] == 0
    output = explain(models["llama"], "--policy", *policy.split()).output
    assert "all heads keep everything" in output and f"{ratio:.2f}x less than dense" in output
    assert "what one row stores" not in output


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--policy", "quest", "--lengths", "99999"], ["--lengths = 99999", "1 to 8192", "--max-model-len"]),
        (["--policy", "quest", "--lengths", "4k"], ["--lengths = 4k", "4096,32768"]),
        (["--policy", "quest", "--block-size", "48"], ["--block-size = 48", "multiple of 32"]),
        (["--policy", "tidal"], ["reselect_layer is missing", "--set reselect_layer=N"]),
        (["--policy", "qest"], ["policy = qest", "'quest'"]),
        (["--policy", "moa", "--set", "artifact=no-such-file"], ["no-such-file", "check the path"]),
    ],
)
def test_what_cannot_be_served_is_refused(models: dict[str, str], flags: list[str], told: list[str]) -> None:
    result = explain(models["llama"], *flags)
    assert result.exit_code == 2
    assert [words for words in told if words not in result.output] == []


def test_pages_are_those_that_serve_would_ask_for(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseserve.server.launch.checks.platform_flags", lambda *_: ["--block-size", "64"])
    assert explained(models["llama"], "--policy", "quest")["page_tokens"] == 64
