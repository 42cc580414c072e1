"""`sparseserve calibrate tidal` finds the layer of the demo model's scouts and writes what `serve` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from sparseserve.calibration.tidal.calibrate import policy_file
from sparseserve.cli.calibrate import app
from sparseserve.config import load_policy, read_policy_file
from sparseserve.demo.circuits import RESELECT_LAYER
from sparseserve.errors import CalibrationError
from sparseserve.policies import Tidal


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tidal", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_demo_models_layer_and_why(built: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy.yaml"
    result = calibrate(built, "-o", output, "--lengths", "2048", "--samples", "1", "--budget", "512")
    assert result.exit_code == 0, result.output
    policy = load_policy(str(output), [], {}, str(built))
    assert policy == Tidal(budget_tokens=512, reselect_layer=(RESELECT_LAYER,))
    assert yaml.safe_load(output.read_text()) == {
        "models": {"demo": {"policy": "tidal", "budget_tokens": 512, "reselect_layer": RESELECT_LAYER}}
    }
    measured = json.loads((tmp_path / "policy.yaml.json").read_text())["results"]
    assert measured["why"] in result.output
    assert "layer 5 looks at the needle most, and finds 100.0% of it among the tokens of layer 4" in measured["why"]
    others = [row for row in measured["candidates"] if row["layer"] != RESELECT_LAYER]
    assert measured["needle_kept"] > 0.99 > max(row["needle_kept"] for row in others)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.yaml", "policy.yaml.json"]


def test_several_layers_on_the_trained_model(tmp_path: Path) -> None:
    model, output = files("sparseserve.demo") / "trained", tmp_path / "policy.yaml"
    options = ["--lengths", "600", "--samples", "1", "--budget", "128", "--select-layer", "0", "--layers", "2"]
    result = calibrate(model, "-o", output, *options)
    assert result.exit_code == 0, result.output
    entry = read_policy_file(str(output))["trained"]
    # layers 1 and 2 hold the retrieval heads: choosing or attending densely there leaves nothing of the needle out
    assert entry == {"policy": "tidal", "budget_tokens": 128, "select_layer": 0, "reselect_layer": [1, 2]}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--lengths", "512", "--budget", "1024", "--select-layer", "0"],
            "--lengths = 512 .*more than 1024 tokens, the budget",
        ),
        (["--layers", "3", "--select-layer", "0"], "--layers = 3 .*at most 1"),
        (["--lengths", "600", "--budget", "256", "--select-layer", "0"], "right answers = 0 of 1 at 600 tokens"),
    ],
)
def test_what_cannot_be_measured_is_said(
    options: list[str], told: str, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    result = calibrate(random_model("llama"), "-o", tmp_path / "out", "--samples", "1", *options)
    assert isinstance(result.exception, CalibrationError)
    with pytest.raises(CalibrationError, match=told):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    text = policy_file("org/model-[v2]", Tidal(reselect_layer=(4, 9)))
    (tmp_path / "policy.yaml").write_text(text)
    policy = load_policy(str(tmp_path / "policy.yaml"), [], {}, "org/model-[v2]")
    assert policy == Tidal(reselect_layer=(4, 9))
