"""`sparseserve explain`: predictions without weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sparseserve.cli import app

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models")]


def explain(model: str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["explain", model, "--skip-tokenizer-init", *flags], env={"COLUMNS": "200"})


def explained(model: str, *flags: str) -> Any:
    result = explain(model, *flags, "--json")
    return json.loads(result.output[result.output.index("{") :])


def test_every_role_and_length_is_told(models: dict[str, str]) -> None:
    told = explained(models["llama"], "--policy", "quest", "--lengths", "4096,8192", "--block-size", "64")
    assert (told["page_tokens"], told["kv_bytes_per_token"]) == (64, 6 * 2 * 2 * 64 * 2)
    assert told["summary_bytes_per_page"] == 6 * 2 * 2 * (2 * 64 * 2)  # layers, heads, units, two bf16 vectors
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
