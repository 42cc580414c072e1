"""`calibrate moa` from the command to a plan that serves, against the uniform window of the same density."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparseserve import cli
from sparseserve.artifacts import load as load_artifact
from sparseserve.calibration.moa import profile as moa_profile
from sparseserve.calibration.moa.answers import Draw, answered
from sparseserve.calibration.moa.calibrate import Goal, SearchedPlan, calibrate
from sparseserve.calibration.moa.windows import MINIMUM, candidates, density, window
from sparseserve.calibration.subject import Subject, load
from sparseserve.cli.calibrate.moa import moa
from sparseserve.errors import ArtifactError, CalibrationError, ConfigError
from sparseserve.model import ModelShape
from sparseserve.policies.moa import Moa
from sparseserve.types import HeadShape

RandomModel = Callable[..., Path]
SMALL = Goal([512], 768, [0.9])
ONE = Draw(1, 0, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """A needle and a stretch of a text that is tokenized at once."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text("Many words that mean nothing. " * 100)
    return Draw(1, 0, text)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the trained model, made by the command."""
    path = tmp_path_factory.mktemp("moa") / "plan.safetensors"
    moa(str(files("sparseserve.demo") / "trained"), path, "1024,1536", 2048, "0.4", samples=3)
    return path


def report(plan: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(plan.with_name(f"{plan.name}.json").read_text())
    return content


def assert_better_than_uniform(results: dict[str, Any], length: int | str, bound: float) -> None:
    """Less loss and more needles, from no more tokens."""
    best, uniform = results["plans"][0], results["uniform"]
    read, read_uniformly = (each["density"][length]["per_kv_head"] for each in (best, uniform))
    assert read <= read_uniformly <= bound + 64 / int(length)  # a page more
    assert best["validation"]["loss"] < uniform["validation"]["loss"]
    assert best["validation"]["needle_accuracy"] > uniform["validation"]["needle_accuracy"]


def test_on_the_trained_model_it_beats_the_uniform_window(plan: Path) -> None:
    assert_better_than_uniform(report(plan)["results"], "2048", 0.4)


def test_on_the_built_model_it_beats_the_uniform_window(demo: Subject, tmp_path: Path) -> None:
    results = calibrate(demo, Goal([768], 1536, [0.4]), Draw(3, 0, None), tmp_path / "plan.safetensors")
    assert_better_than_uniform(results, 1536, 0.4)


def test_the_report_has_every_plan_best_first(plan: Path) -> None:
    results = report(plan)["results"]
    names = [each["file"] for each in results["plans"]]
    assert names == ["plan.safetensors", *(f"plan-{place}.safetensors" for place in range(2, len(names) + 1))]
    losses = [each["validation"]["loss"] for each in results["plans"]]
    assert losses == sorted(losses) and results["dense"]["validation"]["needle_accuracy"] == 1
    for each in results["plans"]:
        artifact = load_artifact(plan.with_name(each["file"]))
        for length, share in each["density"].items():
            lines = window(artifact.tensors["alpha"].flatten(), artifact.tensors["beta"].flatten())
            assert float(density(lines, int(length)).mean()) == pytest.approx(share["per_query_head"])
            assert share["per_query_head"] == share["per_kv_head"] <= 0.4
    assert "--density 0.4" in report(plan)["command"]
    assert not plan.with_name(f"{plan.name}.partial").exists()


def test_the_policy_serves_what_was_validated(plan: Path, trained: Subject) -> None:
    artifact = load_artifact(plan)
    shape = ModelShape("trained", 4, HeadShape(4, 2, 32), 4096, page_size=64)
    validated = SearchedPlan(artifact.tensors["alpha"][:, ::2], artifact.tensors["beta"][:, ::2]).windows(
        trained.device
    )
    lengths = torch.arange(1, 4097)
    for layer, ours in zip(Moa(artifact=str(plan)).plans(shape), validated, strict=True):
        assert layer.window is not None
        assert torch.equal(layer.window.spans(lengths), ours.spans(lengths))
    assert len({tuple(line) for line in zip(*(t[2].tolist() for t in artifact.tensors.values()), strict=True)}) <= 2
    with pytest.raises(ArtifactError, match="does not fit"):
        Moa(artifact=str(plan)).plans(ModelShape("other", 4, HeadShape(2, 2, 32), 4096, page_size=64))


def test_inspect_shows_it(plan: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["inspect", str(plan), "--length", "2048"])
    assert shown.exit_code == 0 and "MoA plan, 4 layers x 8 query heads" in shown.output


def test_candidates_go_from_the_minimum_to_everything() -> None:
    alpha, beta = candidates([2048, 4096, 8192])
    served = torch.stack([density(window(alpha, beta), length) for length in (2048, 4096, 8192)])
    assert len(served.unique(dim=1).T) == len(alpha) > 20
    minimum = MINIMUM / torch.tensor([2048, 4096, 8192]).double()
    assert (served == minimum[:, None]).all(0).any() and torch.equal(served.amin(1), minimum)
    assert (served == 1).all(0).sum() == 1


def test_a_killed_run_goes_on(
    random_model: RandomModel, quick: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, output, made = load(str(random_model("llama"))), tmp_path / "plan.safetensors", list[str]()

    def dies(subject: Subject, draw: Draw, name: str, *rest: Any) -> Any:
        made.append(name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return answered(subject, draw, name, *rest)

    monkeypatch.setattr(moa_profile, "answered", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(subject, SMALL, quick, output)
    results = calibrate(subject, SMALL, quick, output)
    assert made == ["needle-0", "text-0", "text-0"]
    fresh = calibrate(subject, SMALL, quick, tmp_path / "fresh.safetensors")
    assert results["plans"][0]["validation"] == fresh["plans"][0]["validation"]
    assert output.read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()


def test_nan_is_an_error(random_model: RandomModel, quick: Draw, tmp_path: Path) -> None:
    subject = load(str(random_model("llama")))
    subject.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(subject, SMALL, quick, tmp_path / "plan.safetensors")
    assert not (tmp_path / "plan.safetensors").exists()


def test_a_silent_model_is_an_error(random_model: RandomModel, quick: Draw, tmp_path: Path) -> None:
    subject = load(str(random_model("llama")))
    subject.model.generation_config.eos_token_id = list(range(258))
    with pytest.raises(CalibrationError, match="answer to needle-0 = nothing"):
        calibrate(subject, SMALL, quick, tmp_path / "plan.safetensors")


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal([2048], 4096, [0.05]), r"--density = 0.05 .* at least 0.062 at 2048 tokens"),
        (Goal([512, 1024], 2048, [0.5, 0.1]), r"--density = 0.1 .* at least 0.125 at 1024 tokens"),
        (Goal([512], 1024, [1.5]), "--density"),
        (Goal([512, 600], 1024, [0.5, 0.5, 0.5]), "one for each of 2 lengths"),
        (Goal([512], 512, [0.5]), "a length that is not profiled"),
        (Goal([100], 512, [0.5]), "more than 128 tokens"),
        (Goal([512], 1 << 20, [0.5]), "--validate-length = 1048640"),
    ],
)
def test_what_cannot_be_is_said_at_once(goal: Goal, said: str, trained: Subject, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=said):
        calibrate(trained, goal, ONE, tmp_path / "plan.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_of_the_command(tmp_path: Path, built: Path) -> None:
    with pytest.raises(CalibrationError, match="model = "):
        moa(str(tmp_path / "none"), tmp_path / "plan.safetensors")
    with pytest.raises(ConfigError, match="--density = half"):
        moa(str(built), tmp_path / "plan.safetensors", density="half")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="a file with text in it"):
        moa(str(built), tmp_path / "plan.safetensors", "1024", 2048, text=tmp_path / "empty.txt")
