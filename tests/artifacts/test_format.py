"""Our one-file form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparseserve.artifacts import Artifact, load, save
from sparseserve.errors import ArtifactError, FileError

RETRIEVAL = {
    "scores": "sparseserve",
    "per": "kv_head",
    "sink_tokens": 64,
    "recent_tokens": None,
    "rule": {"share": 0.25},
    "complete": True,
}
S2 = {"block_size": 64, "num_local_blocks": 16, "vert_stride": 8, "homo_head": False, "dense_every": None}
MOA = {"sink": 64, "minimum": 128, "granularity": 64}


def moa(layers: int = 3, heads: int = 4, **changes: Any) -> Artifact:
    """A plan with a different span for every head."""
    spans = torch.arange(layers * heads, dtype=torch.float64).reshape(layers, heads)
    tensors = {"alpha": spans * 64, "beta": spans / spans.numel()}
    artifact = Artifact("moa", tensors, dict(MOA), layers, heads, "MoA plan", "0" * 64, model="Ünïcode/模型")
    return replace(artifact, **changes)


ARTIFACTS = [
    moa(),
    Artifact("retrieval", {"scores": torch.rand(2, 8).double()}, RETRIEVAL, 2, 8, kv_heads=8, head_dim=64),
    Artifact("s2", {}, S2, 32, 8, "S2", kv_heads=8, config_sha256="a" * 64),
]


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: artifact.kind)
def test_what_is_saved_is_loaded(artifact: Artifact, tmp_path: Path) -> None:
    save(artifact, tmp_path / "plan.safetensors")
    loaded = load(tmp_path / "plan.safetensors")
    assert replace(loaded, tensors={}) == replace(artifact, tensors={})
    assert loaded.tensors.keys() == artifact.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in artifact.tensors.items())


def test_a_loaded_artifact_outlives_its_file(tmp_path: Path) -> None:
    save(moa(), tmp_path / "plan.safetensors")
    loaded = load(tmp_path / "plan.safetensors")
    (tmp_path / "plan.safetensors").write_bytes(b"")
    assert torch.equal(loaded.tensors["alpha"], moa().tensors["alpha"])


def test_the_same_artifact_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors alone writes its metadata in another order each time."""
    digests = set()
    for turn in range(8):
        save(moa(), tmp_path / f"{turn}.safetensors")
        digests.add(hashlib.sha256((tmp_path / f"{turn}.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_metadata_say_what_the_tensors_do_not(tmp_path: Path) -> None:
    save(moa(kv_heads=2, head_dim=64, config_sha256="b" * 64), tmp_path / "plan.safetensors")
    with safe_open(tmp_path / "plan.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("arguments")) == MOA
    assert metadata.pop("tool_version")
    assert metadata == {
        "format": "sparseserve-artifact/1",
        "policy": "moa",
        "layers": "3",
        "heads": "4",
        "kv_heads": "2",
        "head_dim": "64",
        "model": "Ünïcode/模型",
        "config_sha256": "b" * 64,
        "source": "MoA plan",
        "source_sha256": "0" * 64,
    }


def rewritten(tmp_path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None) -> Path:
    """The file of `moa()` with other tensors or metadata, None for none."""
    path = tmp_path / "plan.safetensors"
    save(moa(), path)
    with safe_open(path, framework="pt") as file:
        strings = file.metadata() | metadata
    found = {key: value for key, value in strings.items() if value is not None}
    save_file(moa().tensors if tensors is None else tensors, path, found or None)
    return path


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"format": "sparseserve-artifact/2"}, "sparseserve-artifact/1"),
        ({"format": None}, "Field required"),
        ({"policy": "quest"}, "'moa', 'retrieval', 'seer' or 's2'"),
        ({"policy": "s2"}, "arguments of s2"),
        ({"layers": "4"}, "4 x 4"),
        ({"layers": "-1"}, "layers = -1"),
        ({"layers": "1e9"}, "layers = 1e9"),
        ({"heads": "999999"}, "heads = 999999"),
        ({"arguments": "{"}, "standard JSON"),
        ({"arguments": "[]"}, "arguments of moa"),
        ({"arguments": '{"sink": 64, "minimum": true, "granularity": 64}'}, "minimum = True"),
        ({"arguments": '{"sink": 64, "sink": 64}'}, "sink is written twice"),
        ({"source_sha256": "xyz"}, "source_sha256"),
        ({"unknown": "key"}, "unknown = key"),
    ],
)
def test_metadata_that_are_not_right_are_refused(tmp_path: Path, metadata: dict[str, str | None], told: str) -> None:
    with pytest.raises(ArtifactError) as error:
        load(rewritten(tmp_path, None, **metadata))
    assert told in str(error.value) and "plan.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "alpha = missing"),
        ({"alpha": torch.zeros(3, 4).double()}, "beta = missing"),
        (moa().tensors | {"gamma": torch.zeros(1)}, "gamma = not expected"),
        (moa().tensors | {"beta": torch.zeros(3, 4)}, "torch.float32"),
        (moa().tensors | {"beta": torch.zeros(4, 3).double()}, "4 x 3"),
        (moa().tensors | {"beta": torch.tensor(0.0).double()}, "a single number"),
        (moa().tensors | {"alpha": torch.full((3, 4), torch.nan).double()}, "NaN"),
        (moa().tensors | {"alpha": torch.full((3, 4), torch.inf).double()}, "infinity"),
    ],
)
def test_tensors_that_are_not_right_are_refused_to_load_and_to_save(
    tmp_path: Path, tensors: dict[str, torch.Tensor], told: str
) -> None:
    for refused in (lambda: load(rewritten(tmp_path, tensors)), lambda: save(moa(tensors=tensors), tmp_path / "x")):
        with pytest.raises(ArtifactError) as error:
            refused()
        assert told in str(error.value)
    assert not (tmp_path / "x").exists()


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"format = pt is refused.*sparseserve-artifact/1"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:100], lambda data: data + b"\0"])
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "plan.safetensors"
    save(moa(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match="plan.safetensors: safetensors"):
        load(path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="check the path"):
        save(moa(), tmp_path / "nowhere" / "plan.safetensors")
