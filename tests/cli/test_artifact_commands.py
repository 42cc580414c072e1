"""`sparseserve convert` and `sparseserve inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparseserve.artifacts import Artifact, load, save
from sparseserve.cli import app

WIDE = {"COLUMNS": "160"}
MODEL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
S2 = {"blocksparse_block_size": 64, "blocksparse_num_local_blocks": 4, "blocksparse_vert_stride": 4}


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and all that a command prints."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env=WIDE)
    return result.exit_code, result.output


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A MoA plan of 2 layers x 4 query heads."""
    path = tmp_path / "moa_alpha_beta.json"
    path.write_text(json.dumps({"alphas": [[0] * 4] * 2, "betas": [[1, 0.5, 0.25, 0.25], [0.25] * 4]}))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of the model that the plan fits."""
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def test_convert_says_what_it_found_and_writes_it(plan: Path, model: Path, tmp_path: Path) -> None:
    code, output = run("convert", plan, "-o", tmp_path / "plan.safetensors", "--model", model)
    assert code == 0
    for told in ("MoA plan, 2 layers x 4 query heads", "tiny-model: 2 layers, 4 query and 2 KV heads of 64"):
        assert told in output
    assert "reads 0.375 of 32768 tokens; 0.438 as KV heads" in output  # (2 + 1) / 8 and (1.25 + 0.5) / 4
    written = load(tmp_path / "plan.safetensors")
    assert (written.model, written.kv_heads, written.head_dim) == ("tiny-model", 2, 64)
    assert written.config_sha256 and len(written.config_sha256) == 64


def test_convert_needs_no_model(plan: Path, tmp_path: Path) -> None:
    assert run("convert", plan, "-o", tmp_path / "plan.safetensors")[0] == 0
    assert load(tmp_path / "plan.safetensors").model is None


def test_convert_lists_every_mismatch_and_writes_nothing(plan: Path, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": 3, "num_attention_heads": 8}))
    code, output = run("convert", plan, "-o", tmp_path / "plan.safetensors", "--model", model)
    assert code == 2
    for told in ("does not fit tiny-model", "layers = 2", "query heads = 4", "Expected: 8, as tiny-model has"):
        assert told in output
    assert not (tmp_path / "plan.safetensors").exists()


def test_convert_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a plan")
    code, output = run("convert", tmp_path / "notes.txt", "-o", tmp_path / "x")
    assert code == 2
    assert "notes.txt" in output and "MoA plan" in output and "Traceback" not in output


def test_inspect_prints_a_line_for_each_layer(plan: Path) -> None:
    code, output = run("inspect", plan, "--length", "1024")
    assert code == 0
    for told in ("reads 0.375 of 1024 tokens", "minimum", "128", "█▅▃▃ ", "0.500", "▃▃▃▃ ", "0.250"):
        assert told in output


def test_inspect_prints_strides_and_dense_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL | S2 | {"dense_attention_every_n_layers": 2}))
    code, output = run("inspect", tmp_path)
    assert code == 0
    assert "3 2 1 0" in output and "dense" in output


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """Decode gates of one layer."""
    arguments = {"block_size": 64, "gate_dim": 2, "budget_tokens": 4096, "threshold": 0.0, "method": "threshold"}
    arguments |= {"start_layer": 0, "use_rope": True, "use_qk_norm": False}
    tensors = {"query.0": torch.zeros(2, 2, 4, 2), "key.0": torch.zeros(2, 12, 2)}
    path = tmp_path / "gates.safetensors"
    save(Artifact("seer", tensors, arguments, 1, 2, "gates", kv_heads=2, head_dim=4), path)
    return path


def test_inspect_prints_gates_and_draws_none(gates: Path, tmp_path: Path) -> None:
    assert "2 x 2 x 4 x 2 float32" in run("inspect", gates)[1]
    code, output = run("inspect", gates, "--plot", tmp_path / "heads.png")
    assert code == 2
    assert "gates decide at every step" in output
    assert not (tmp_path / "heads.png").exists()


def test_inspect_draws_the_head_map(plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("inspect", plan, "--plot", tmp_path / "heads.png")[0] == 0
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    code, output = run("inspect", plan, "--plot", tmp_path / "heads.docx")
    assert code == 2 and "docx" in output


def test_inspect_names_the_extra_that_draws(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseserve.cli.extras.find_spec", lambda name: None)
    code, output = run("inspect", plan, "--plot", tmp_path / "heads.png")
    assert code == 2
    assert 'pip install "sparseserve[calibrate]"' in output
