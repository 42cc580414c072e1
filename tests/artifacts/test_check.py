"""Whether an artifact fits a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.artifacts import Artifact, load, read_model
from sparseserve.errors import ArtifactError
from sparseserve.model import ModelShape
from sparseserve.types import HeadShape

Write = Callable[..., Path]


def model(layers: int = 4, kv_heads: int = 2, group: int = 4, head_dim: int = 64, **more: Any) -> ModelShape:
    """A model as one rank sees it."""
    return ModelShape("tiny", layers, HeadShape(kv_heads, group, head_dim), 4096, 64, **more)


def plan(layers: int = 4, heads: int = 8, **more: Any) -> Artifact:
    """A MoA plan, per query head."""
    tensors = {name: torch.zeros(layers, heads).double() for name in ("alpha", "beta")}
    return Artifact("moa", tensors, {"sink": 64, "minimum": 128, "granularity": 64}, layers, heads, "MoA plan", **more)


def test_what_fits_passes_on_every_rank() -> None:
    plan(kv_heads=2, head_dim=64, config_sha256="a").check(model(config_sha256="a"))
    plan(config_sha256="a").check(model())  # the hash is compared where both know it
    plan(heads=16, kv_heads=4).check(model(kv_heads=2, ranks=2, rank=1))
    plan(heads=16, kv_heads=2).check(model(kv_heads=1, ranks=4))  # every KV head on two ranks


def test_every_mismatch_is_told_at_once() -> None:
    wrong = plan(layers=5, heads=12, kv_heads=3, head_dim=80, config_sha256="a")
    with pytest.raises(ArtifactError) as error:
        wrong.check(model(config_sha256="b"))
    first, *problems = str(error.value).splitlines()
    assert first == "MoA plan does not fit tiny."
    told = ["layers = 5", "query heads = 12", "KV heads = 3", "head dim = 80", "sha256 of config.json = a"]
    expected = ["4", "8", "2", "64", "b"]
    assert len(problems) == len(told)
    for problem, text, number in zip(problems, told, expected, strict=True):
        assert text in problem and f"Expected: {number}, as tiny has." in problem


@pytest.mark.parametrize("kv_heads", [3, 8])
def test_replicated_heads_are_still_checked(kv_heads: int) -> None:
    with pytest.raises(ArtifactError, match=f"KV heads = {kv_heads}"):
        plan(heads=16, kv_heads=kv_heads).check(model(kv_heads=1, ranks=4))


def test_a_list_of_heads_is_completed_from_the_model(write: Write) -> None:
    heads = load(write({"1": [0, 2]}))
    done = heads.resolve(model(layers=3, kv_heads=2, ranks=2))
    assert done.tensors["scores"].tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert (done.layers, done.heads, done.kv_heads, done.complete, done.model) == (3, 4, 4, True, "tiny")
    with pytest.raises(ArtifactError, match="layers = 3"):
        done.check(model(layers=4, kv_heads=2, ranks=2))


def test_a_list_of_heads_beyond_the_model_is_refused(write: Write) -> None:
    heads = load(write({"9": [5]}))
    with pytest.raises(ArtifactError) as error:
        heads.check(model())
    assert "layers = at least 10 is refused" in str(error.value)
    assert "KV heads = at least 6 is refused. Expected: at most 2" in str(error.value)


def test_a_list_of_heads_needs_to_know_how_many_there_are(write: Write) -> None:
    """One head on each of several ranks may be the same head: padded to the wrong number, ranks would read wrongly."""
    heads = load(write({"1": [0]}))
    with pytest.raises(ArtifactError, match="--model config.json"):
        heads.resolve(model(kv_heads=1, ranks=4))
    heads.resolve(model(kv_heads=2)).check(model(kv_heads=1, ranks=4))


CONFIG = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (CONFIG, HeadShape(2, 4, 64)),
        (CONFIG | {"head_dim": 128}, HeadShape(2, 4, 128)),
        ({key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}, HeadShape(8, 1, 64)),
        ({"vision_config": {}, "text_config": CONFIG}, HeadShape(2, 4, 64)),
    ],
    ids=["gqa", "own head dim", "mha", "in text_config"],
)
def test_a_models_shape_is_read_from_its_config(tmp_path: Path, config: dict[str, Any], heads: HeadShape) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        shape = read_model(path)
        assert (shape.name, shape.layers, shape.heads) == (tmp_path.name, 4, heads)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "num_hidden_layers"),
        ([], "config.json"),
        (CONFIG | {"num_attention_heads": 9}, "multiple of the KV heads"),
        ({key: value for key, value in CONFIG.items() if key != "hidden_size"}, "their dim"),
        (CONFIG | {"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        (CONFIG | {"num_key_value_heads": True}, "num_key_value_heads"),
    ],
)
def test_a_config_without_heads_is_refused(write: Write, config: Any, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        read_model(write(config, "config.json"))
