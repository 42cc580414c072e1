"""The report says how to get its numbers again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseserve.calibration.report import rerun, write_report
from sparseserve.calibration.subject import Subject
from sparseserve.cli.numbers import whole_numbers
from sparseserve.errors import ConfigError


def test_report_names_model_versions_and_command(demo: Subject, tmp_path: Path) -> None:
    output = tmp_path / "plan.safetensors"
    path = write_report(output, "moa", demo, {"lengths": [512, 2048], "text": None}, {"loss": [0.25]})
    report = json.loads(path.read_text())
    assert path.name == "plan.safetensors.json"
    assert report["results"] == {"loss": [0.25]}
    assert report["config_sha256"] == demo.shape.config_sha256
    assert report["versions"].keys() >= {"python", "sparseserve", "torch", "transformers"}
    assert report["command"].endswith(f"--output {output} --lengths 512,2048")


def test_command_spells_out_every_option() -> None:
    options = {
        "depths": [0.0, 0.5],
        "needle_tokens": 3,
        "text": "my file.txt",
        "device": None,
        "quick": True,
        "no": False,
    }
    words = "sparseserve calibrate kind some/model --output out.yaml --depths 0.0,0.5 --needle-tokens 3"
    assert rerun("kind", "some/model", Path("out.yaml"), options) == f"{words} --text 'my file.txt' --quick"


def test_numbers_that_make_no_sense_are_not_written(demo: Subject, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_report(tmp_path / "out", "moa", demo, {}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "a", "5,", "0", "-3", "1.5"])
def test_lists_of_numbers(text: str) -> None:
    assert whole_numbers("--lengths", "512, 2048") == [512, 2048]
    with pytest.raises(ConfigError, match="--lengths"):
        whole_numbers("--lengths", text)
