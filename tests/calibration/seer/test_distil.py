"""Gates distilled from the trained demo model: what they hold, that they load, serve and survive a kill."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sparseserve.artifacts import load
from sparseserve.calibration.attention import Attention, hooked
from sparseserve.calibration.chunks import Chunks
from sparseserve.calibration.samples import document, stretch, text_of
from sparseserve.calibration.seer.data import PARTS, Documents
from sparseserve.calibration.seer.distil import Distilled, Recipe, distil
from sparseserve.calibration.seer.recall import BLOCKS_PER_CHOSEN, best_blocks
from sparseserve.calibration.seer.training import Training
from sparseserve.calibration.subject import Subject
from sparseserve.cli.calibrate import app
from sparseserve.errors import CalibrationError
from sparseserve.policies import Seer
from sparseserve.testing.bed import Bed
from sparseserve.testing.gates import plain_rope

MODEL = str(files("sparseserve.demo") / "trained")
TOKENS, BLOCK = 1024, 16
SHORT = ["--lengths", str(TOKENS), "--samples", "12", "--held-out", "2", "--rows", "128", "--steps", "96"]
DOCUMENTS = Documents([256], samples=2, held_out=1, rows=16, block=BLOCK)
RECIPE = Recipe(steps=16, rate=5e-3, gate_dim=32, qk_norm=True, rope=True)


@dataclass(frozen=True)
class Run:
    """What the command wrote and said."""

    file: Path
    report: dict[str, Any]
    said: str


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["seer", *arguments])
    assert result.exit_code == 0, result.exception
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    file = tmp_path_factory.mktemp("seer") / "gates.safetensors"
    said = command(MODEL, "-o", str(file), *SHORT, "--block-size", str(BLOCK))
    return Run(file, json.loads(file.with_name("gates.safetensors.json").read_text()), said)


def test_the_held_out_loss_falls_and_in_every_layer_by_a_quarter(run: Run) -> None:
    loss = run.report["results"]["loss"]
    assert loss["held_out_steps"][0] == 0 and loss["held_out_steps"][-1] == len(loss["train"]) == 96
    assert all(curve[-1] < 0.75 * curve[0] for curve in loss["held_out_layers"])
    assert len(loss["held_out"]) == 9 and loss["held_out"] == sorted(loss["held_out"], reverse=True)


def test_gates_beat_mean_keys_and_random_blocks(run: Run) -> None:
    recall = run.report["results"]["recall"]
    means = {name: sum(layers) / len(layers) for name, layers in recall.items()}
    assert means["random"] < means["mean_key"] < means["gate"] < means["block_max"] < 1


def test_the_published_layout_holds_the_same_gates(run: Run) -> None:
    ours, theirs = load(run.file), load(run.file.with_name("gates-published"))
    assert ours.arguments == theirs.arguments and ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
    assert (ours.layers, ours.heads, ours.head_dim, ours.model) == (theirs.layers, theirs.heads, 32, theirs.model)


def test_nothing_else_is_left_and_the_files_are_told(run: Run) -> None:
    names = {path.name for path in run.file.parent.iterdir()}
    assert names == {"gates.safetensors", "gates.safetensors.json", "gates-published"}
    assert all(name in run.said.replace("\n", "") for name in names)
    assert "--steps 96" in run.report["command"] and "--no" not in run.report["command"]


def test_the_policy_chooses_the_blocks_that_the_trained_gate_chooses(run: Run, trained: Subject) -> None:
    """Rotated queries and keys in the server's pages, un-rotated there, scored and selected by the served ops."""
    ids, layers = document(trained, TOKENS, seed=99), list[Attention]()
    with torch.no_grad(), hooked(layers.append):
        trained.model(trained.tensor(ids))
    lengths = [TOKENS, 1000, 801, 530]
    query = torch.stack([torch.stack([a.query[:, n - 1] for n in lengths]) for a in layers])
    key, value = (
        torch.stack([getattr(a, name).transpose(0, 1).expand(len(lengths), -1, -1, -1) for a in layers])
        for name in ("key", "value")
    )
    shape = replace(trained.shape, max_len=TOKENS, page_size=32, rope=partial(plain_rope, TOKENS, theta=1e6))
    shares = trained_shares(run, trained, layers, torch.tensor(lengths[::-1]) - 1).flip(1)
    for row, length in enumerate(lengths):
        chosen = (length - 1) // BLOCK // BLOCKS_PER_CHOSEN
        policy = Seer(artifact=str(run.file), budget_tokens=(chosen + 1) * BLOCK, min_tokens=0)
        bed = Bed(policy, shape, lengths, dtype=torch.float32).fill(key, value)
        masks = torch.stack(bed.decode(query).masks)[:, row, :, :length]
        blocks = torch.nn.functional.pad(masks, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK)).any(-1)
        expected = best_blocks(shares, torch.tensor(lengths) - 1, BLOCK)[:, row, :, : blocks.shape[-1] - 1]
        assert torch.equal(blocks[..., :-1], expected) and blocks[..., -1].all()


def trained_shares(run: Run, subject: Subject, layers: list[Attention], rows: Tensor) -> Tensor:
    """The log-softmax [L, R, H, N] of the gates in the file, by the form that trains."""
    from sparseserve.calibration.seer.features import layer_features
    from sparseserve.calibration.seer.gate import Gates
    from sparseserve.calibration.seer.rope import rotations

    artifact = load(run.file)
    unrope, rope = rotations(subject, TOKENS, artifact.arguments["gate_dim"])
    gates = Gates(subject.shape.layers, subject.shape.heads, artifact.arguments["gate_dim"], True, seed=0)
    for name, weight in gates.named_parameters():
        weight.data = torch.stack([artifact.tensors[f"{name}.{layer}"] for layer in range(len(layers))]).float()
    found = [layer_features(attention, rows, BLOCK, unrope) for attention in layers]
    query, pooled = (torch.stack([getattr(layer, name) for layer in found]) for name in ("query", "pooled"))
    with torch.no_grad():
        shares: Tensor = gates(query, pooled, rows, BLOCK, rope)
    return shares


def test_no_held_out_text_is_trained_on(trained: Subject, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 9000 + "b" * 1000)
    for part, letter in (("train", b"a"), ("held-out", b"b")):
        drawn = [document(trained, 500, seed, tmp_path / "text", PARTS[part])[1:] for seed in range(20)]
        assert {token for ids in drawn for token in ids} == set(letter)


def test_no_held_out_window_of_the_default_text_is_trained_on(trained: Subject) -> None:
    """The topics of CPython's reference quote each other. A token is a byte."""
    characters = len(text_of(None)) - 20
    drawn = {part: int((last - first) * characters) for part, (first, last) in PARTS.items()}  # nearly all of a part
    train, held_out = (bytes(stretch(trained, drawn[part], seed=0, part=PARTS[part])) for part in PARTS)
    known = set(windows(train))
    assert len(held_out) > 32 * 1024 and known.isdisjoint(windows(held_out))


def windows(text: bytes, size: int = 200) -> list[bytes]:
    return [text[start : start + size] for start in range(len(text) - size + 1)]


def test_a_changed_text_is_measured_anew(tmp_path: Path) -> None:
    documents = replace(DOCUMENTS, text=tmp_path / "text")
    told = []
    for text in ("first", "other"):
        (tmp_path / "text").write_text(text)
        told.append(documents.arguments)  # which the chunks are kept by
    assert told[0] != told[1]


def distilled(subject: Subject, folder: Path) -> Distilled:
    return distil(subject, Chunks(folder / "gates", {}), DOCUMENTS, RECIPE)


def test_a_killed_run_ends_with_the_same_gates(
    trained: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = distilled(trained, tmp_path / "whole")
    step, taken, kills = Training.step, list[int](), [9]

    def dying(self: Training, number: int) -> Tensor:
        if number in kills:
            kills.remove(number)
            raise KeyboardInterrupt
        taken.append(number)
        return step(self, number)

    monkeypatch.setattr(Training, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        distilled(trained, tmp_path)
    again = distilled(trained, tmp_path)
    assert taken == [*range(9), *range(8, 16)]  # a part is two steps
    assert again.losses.train == whole.losses.train
    states = again.gates.state_dict(), whole.gates.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("documents", "recipe", "said"),
    [
        ({"lengths": [255]}, {}, "--lengths = 255 is refused. Expected: at least 256 tokens, 16 blocks of 16"),
        ({"lengths": [1 << 20]}, {}, "at most 16384 tokens"),
        ({"block": 24}, {}, "--block-size = 24 is refused. Expected: a multiple of 16"),
        ({}, {"gate_dim": 24}, "--gate-dim = 24 is refused. Expected: a multiple of 16"),
        ({}, {"gate_dim": 272}, "--gate-dim = 272"),
        ({}, {"rate": 1e30, "qk_norm": False}, "give a smaller --learning-rate"),
        ({"text": "empty.txt"}, {}, "a file with text in it"),
        ({"text": "short.txt"}, {}, "held out"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    documents: dict[str, Any], recipe: dict[str, Any], said: str, trained: Subject, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a word " * 100)
    if "text" in documents:
        documents = {"text": tmp_path / documents["text"]}
    with pytest.raises(CalibrationError, match=said):
        distil(trained, Chunks(tmp_path / "gates", {}), replace(DOCUMENTS, **documents), replace(RECIPE, **recipe))
