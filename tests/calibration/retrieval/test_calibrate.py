"""Both detectors find the known retrieval heads of both models, and windowing those is what loses the needle."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer import Typer
from typer.testing import CliRunner, Result

from sparseserve.artifacts import load as load_artifact
from sparseserve.artifacts import save
from sparseserve.calibration.attention import Attention
from sparseserve.calibration.chunks import Chunks
from sparseserve.calibration.retrieval.calibrate import HeadScores, Method, artifact, measure, retrieval_heads
from sparseserve.calibration.samples import answer, needle
from sparseserve.calibration.subject import Subject
from sparseserve.cli.calibrate import app
from sparseserve.demo.circuits import retrieval_heads as built_in
from sparseserve.errors import CalibrationError, ConfigError
from sparseserve.model import ModelShape
from sparseserve.policies import Retrieval
from sparseserve.types import HeadShape, Role

TRAINED = [(1, 1), (2, 0), (2, 3)]  # of sparseserve/demo/trained/README.md
METHODS: list[Method] = ["copy", "induction"]
Heads = list[tuple[int, int]]
RandomModel = Callable[..., Path]


@pytest.fixture(scope="module")
def of_demo(demo: Subject, tmp_path_factory: pytest.TempPathFactory) -> HeadScores:
    return measure(demo, Chunks(tmp_path_factory.mktemp("demo") / "out", {}), [2048], [0.6], samples=1)


@pytest.fixture(scope="module")
def of_trained(trained: Subject, tmp_path_factory: pytest.TempPathFactory) -> HeadScores:
    return measure(trained, Chunks(tmp_path_factory.mktemp("trained") / "out", {}), [1024], [0.2, 0.7], samples=1)


@pytest.mark.parametrize("method", METHODS)
def test_the_known_heads_of_both_models(of_demo: HeadScores, of_trained: HeadScores, method: Method) -> None:
    assert retrieval_heads(of_demo, method, kv_heads=4) == built_in()
    assert retrieval_heads(of_trained, method, kv_heads=4) == TRAINED


def test_the_published_score_takes_scouts_for_retrieval_heads(of_demo: HeadScores) -> None:
    """Which is why ours differs; see `copying.copied`."""
    assert of_demo.top is not None and of_demo.copied is not None
    assert of_demo.top[2, 4] == of_demo.top[3, 4] == of_demo.copied[3, 4] == 1 and of_demo.copied[2, 4] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_policy_serves_what_was_found(of_demo: HeadScores, demo: Subject, method: Method, tmp_path: Path) -> None:
    save(artifact(of_demo, demo, method), tmp_path / "heads.safetensors")
    policy = Retrieval(artifact=str(tmp_path / "heads.safetensors"))
    model = ModelShape("demo", 6, HeadShape(4, 2, 64), 65536, 64, config_sha256=demo.shape.config_sha256)
    plans = policy.plans(model)
    assert all(plan.role is Role.WINDOW for plan in plans)
    full = [(plan.layer, head) for plan in plans for head in range(4) if plan.window and plan.window.beta[head, 0] == 1]
    assert full == built_in()


def windowed(heads: Heads, sink: int = 4, recent: int = 128) -> Callable[[Attention], Tensor]:
    """Attention in which these (layer, KV head) see the first and the most recent tokens only."""

    def hook(attention: Attention) -> Tensor:
        mine = torch.tensor([(attention.layer, head) in heads for head in range(len(attention.key))])

        def keep(first: int, last: int) -> Tensor:
            key, row = torch.arange(last), torch.arange(first, last)[:, None]
            seen = (key < sink) | (key > row - recent)
            return seen | ~mine.repeat_interleave(attention.group)[:, None, None]

        return attention.masked_output(keep)

    return hook


def right_without(subject: Subject, heads: Heads, tokens: int, seeds: range) -> float:
    """The share of needles answered with these heads windowed, in question and decode rows."""
    questions = [needle(subject, tokens, depth, seed) for seed in seeds for depth in (0.1, 0.5)]
    return sum(answer(subject, each, windowed(heads), rows=40)[1] for each in questions) / len(questions)


def test_windowing_the_found_heads_loses_the_needle(trained: Subject, of_trained: HeadScores) -> None:
    """Those of both methods, which are the same; as many others do not matter."""
    (found,) = {tuple(retrieval_heads(of_trained, method, kv_heads=4)) for method in METHODS}
    others = [(layer, head) for layer in range(4) for head in range(4) if (layer, head) not in found]
    seeds = range(100, 102)
    assert right_without(trained, list(found), 1024, seeds) < 0.2
    assert right_without(trained, random.Random(0).sample(others, len(found)), 1024, seeds) == 1


def calibrate(*arguments: object) -> tuple[Result, str]:
    """What `sparseserve calibrate retrieval-heads` does and all that it says."""
    parent = Typer()
    parent.add_typer(app, name="calibrate")
    result = CliRunner().invoke(parent, ["calibrate", "retrieval-heads", *map(str, arguments)], env={"COLUMNS": "160"})
    return result, result.output


def test_command_writes_map_and_report(tmp_path: Path) -> None:
    model, output = files("sparseserve.demo") / "trained", tmp_path / "heads.safetensors"
    result, said = calibrate(model, "-o", output, "--lengths", "600", "--depths", "0.3,0.7", "--method", "induction")
    assert result.exit_code == 0, said
    assert "2 of 2 at 600 tokens" in said and f"--policy retrieval --set artifact={output}" in said
    heads, report = load_artifact(output), json.loads((tmp_path / "heads.safetensors.json").read_text())
    assert heads.arguments["scores"] == "sparseserve" and heads.arguments["rule"] == {"threshold": 0.1}
    assert heads.tensors["scores"].shape == (4, 4)
    assert report["results"]["retrieval_heads"] == dict.fromkeys(METHODS, [list(head) for head in TRAINED])
    assert report["results"]["agreement"]["overlap"] == 1
    assert report["command"].endswith("--lengths 600 --depths 0.3,0.7 --samples 1 --method induction --seed 0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.safetensors", "heads.safetensors.json"]


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({}, CalibrationError, r"right answers = 0 at 600 tokens.*smaller --lengths.*--method induction"),
        ({"--method": "induction"}, CalibrationError, "largest score = 0.000 .*reaches 0.1"),
        ({"--lengths": "4096"}, CalibrationError, "--lengths = 4160 .*at most 4096 tokens"),
        ({"--depths": "0.5,2"}, ConfigError, "--depths = 0.5,2 .*from 0 to 1"),
        ({"--lengths": "100"}, CalibrationError, "length = 100 .*at least"),
    ],
)
def test_what_cannot_be_measured_is_said(
    options: dict[str, str], error: type[Exception], told: str, random_model: RandomModel, tmp_path: Path
) -> None:
    options = {"--lengths": "600", "--depths": "0.5"} | options
    result, _ = calibrate(random_model("llama"), "-o", tmp_path / "out", *sum(options.items(), ()))
    assert isinstance(result.exception, error)
    assert re.search(told, str(result.exception))
    assert not (tmp_path / "out").exists()
