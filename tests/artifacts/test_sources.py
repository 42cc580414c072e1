"""Files as published: what they become, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.artifacts import load, moa_density
from sparseserve.errors import ArtifactError

Write = Callable[..., Path]
PHI3_SMALL = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_triton_kernel_block_size": 64,
    "dense_attention_every_n_layers": 2,
}
DUO_CONFIG = {"sink_size": 128, "recent_size": 256, "model_name": "models/tiny", "threshold": 0.5, "sparsity": None}


def refused(path: Path, *told: str) -> None:
    """Loading is refused with the file and all of `told` in the message."""
    with pytest.raises(ArtifactError) as error:
        load(path)
    assert all(text in str(error.value) for text in (str(path.name), *told)), str(error.value)


@pytest.mark.parametrize(
    ("name", "layers", "per_query_head", "per_kv_head"),
    [
        ("meta-llama--Llama-3.2-1B-Instruct", 16, (0.486, 0.484, 0.464, 0.454), (0.659, 0.620)),
        ("gradientai--Llama-3-8B-Instruct-262k", 32, (0.484, 0.492, 0.495, 0.496), (0.655, 0.682)),
    ],
)
def test_published_moa_plans_have_the_densities_counted_for_them(
    published: Path, name: str, layers: int, per_query_head: tuple[float, ...], per_kv_head: tuple[float, ...]
) -> None:
    plan = load(published / "moa" / name)
    assert (plan.kind, plan.layers, plan.heads, plan.query_heads) == ("moa", layers, 32, 32)
    spans = plan.tensors["alpha"], plan.tensors["beta"]
    lengths = 4096, 8192, 16384, 32768
    assert tuple(round(float(moa_density(*spans, length).mean()), 3) for length in lengths) == per_query_head
    assert tuple(round(float(moa_density(*spans, length, 4).mean()), 3) for length in lengths[1::2]) == per_kv_head


@pytest.mark.parametrize(
    ("name", "shape", "full"),
    [("Llama-2-7B-32K-Instruct", (32, 32), 0.436), ("Meta-Llama-3.1-8B-Instruct", (32, 8), 0.914)],
)
def test_published_duo_patterns_have_the_counts_of_their_files(
    published: Path, name: str, shape: tuple[int, int], full: float
) -> None:
    pattern = load(published / "duo" / name)
    scores = pattern.tensors["scores"]
    assert scores.shape == shape and pattern.kv_heads == shape[1]
    assert round(float((scores >= 0.5).double().mean()), 3) == full
    assert scores.min() == 0 and scores.max() == 1
    assert (pattern.arguments["sink_tokens"], pattern.arguments["recent_tokens"]) == (128, 256)


def test_published_moa_plans_never_widen_a_window_backwards(published: Path) -> None:
    """Every published pair has beta <= 1: N - alpha - beta N never falls."""
    for file in (published / "moa").glob("*/*.json"):
        assert load(file).tensors["beta"].max() <= 1


def test_moa_density_of_spans_written_by_hand() -> None:
    alpha, beta = torch.tensor([[-1024.0, 0, 512, 0]]).double(), torch.tensor([[1.0, 0, 0.25, 1]]).double()
    # 128 is the minimum, the row's length the maximum
    assert (moa_density(alpha, beta, 4096) * 4096).tolist() == [[3072, 128, 1536, 4096]]
    assert (moa_density(alpha, beta, 4096, group=2) * 4096).tolist() == [[3072, 4096]]
    assert moa_density(alpha, beta, 100).tolist() == [[1, 1, 1, 1]]


def test_a_moa_plan_keeps_its_numbers(write: Write) -> None:
    plan = load(write({"alphas": [[-1024, 0.5], [0, 8192.0]], "betas": [[1, 0], [0.125, 0.5]]}))
    assert plan.tensors["alpha"].tolist() == [[-1024, 0.5], [0, 8192]]
    assert plan.tensors["beta"].dtype == torch.float64
    assert plan.arguments == {"sink": 64, "minimum": 128, "granularity": 64}


def test_retrieval_head_scores_are_the_means_of_their_detections(write: Write) -> None:
    detections = {"0-0": [0, 0], "0-1": [0.25, 0.75], "1-0": [1, 1.0], "1-1": [0.1, 0.2], "2-1": [0, 0], "2-0": [1, 0]}
    scores = load(write(detections))
    assert scores.tensors["scores"].tolist() == [[0, 0.5], [1, pytest.approx(0.15)], [0.5, 0]]
    assert (scores.query_heads, scores.kv_heads) == (2, None)
    assert scores.arguments["rule"] == {"threshold": 0.1}
    assert scores.arguments["sink_tokens"] is None


def test_retrieval_head_runs_append_to_their_file(write: Write) -> None:
    """The detector adds the detections of a second run to the lists of the first."""
    first, second = {"0-0": [0.5], "0-1": [1.0]}, {"0-0": [0.25, 0.75], "0-1": [0.0, 0.5]}
    both = load(write({key: first[key] + second[key] for key in first}))
    assert both.tensors["scores"].tolist() == [[0.5, 0.5]]
    assert "3 detections" in both.source


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "in the folder of its training run"])
def test_duo_and_lserve_patterns_load_from_their_folder(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "lr=0.02" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text("1.00e+00\t-1.4e-03\n6.25e-01\t1.001e+00\n")
    (folder / "config.json").write_text(json.dumps(DUO_CONFIG))
    pattern = load(tmp_path)
    assert pattern.tensors["scores"].tolist() == [[1, 0], [0.625, 1]]
    assert pattern.arguments["rule"] == {"share": 0.5}
    assert pattern.model == "models/tiny"
    assert load(folder / "full_attention_heads.tsv").sha256 == pattern.sha256


def test_razor_lists_are_scores_of_one_and_zero(write: Write) -> None:
    heads = load(write({"1": [0, 2], "3": []}))
    assert heads.tensors["scores"].tolist() == [[0, 0, 0], [1, 0, 1]]
    assert not heads.complete
    assert (heads.arguments["sink_tokens"], heads.arguments["recent_tokens"]) == (4, 256)


def test_msmodelslim_lists_are_united(tmp_path: Path) -> None:
    torch.save({"prefix_matching": {0: [1], 2: [0]}, "copying": {0: [1, 3]}}, tmp_path / "heads.pt")
    heads = load(tmp_path / "heads.pt")
    assert heads.tensors["scores"].tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_s2_patterns_come_from_the_models_own_config(write: Write, tmp_path: Path) -> None:
    path = write(PHI3_SMALL, "config.json")
    pattern = load(tmp_path)
    assert pattern.arguments == {
        "block_size": 64,
        "num_local_blocks": 16,
        "vert_stride": 8,
        "homo_head": False,
        "dense_every": 2,
    }
    assert (pattern.layers, pattern.query_heads, pattern.kv_heads, pattern.head_dim) == (32, 32, 8, 128)
    assert load(path).sha256 == pattern.sha256


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"alphas": [[0.0]]}, "betas"),
        ({"alphas": [[0.0]], "betas": [[0.5, 0.5]]}, "1 x 2"),
        ({"alphas": [[0.0, 1.0], [0.0]], "betas": [[0.5, 0.5]] * 2}, "alphas[1]"),
        ({"alphas": [[True]], "betas": [[0.5]]}, "alphas[0][0]"),
        ({"alphas": [["0"]], "betas": [[0.5]]}, "valid number"),
        ({"alphas": [], "betas": []}, "at least 1"),
        ({"alphas": [[0.0]] * 1025, "betas": [[0.5]] * 1025}, "at most 1024"),
        ({"alphas": [[0.0]], "betas": [[1.125]]}, "0 to 1"),
        ({"alphas": [[1e300]], "betas": [[0.5]]}, "at most 2147483647 tokens"),
        ({"alphas": [[0.0]], "betas": [[0.5]], "model": "x"}, "not permitted"),
        ('{"alphas": [[NaN]], "betas": [[0.5]]}', "NaN is not a number"),
        ('{"alphas": [[1e999]], "betas": [[0.5]]}', "too large"),
        ('{"alphas": [[0]], "betas": [[0.5]], "betas": [[1]]}', "betas is written twice"),
        ('{"alphas": [[0', "standard JSON"),
        ('{"alphas": ' + "[" * 100_000, "nested too deeply"),
        ('{"alphas": [[' + "9" * 5000 + "]]}", "standard JSON"),
        ({"0-0": [0.5], "1-1": [0.5]}, "0-1 = missing"),
        ({"0-0": [0.5], "0-1": [0.5, 1.0]}, "1 to 2"),
        ({"0-0": []}, "at least 1"),
        ({"0-0": [0.5], "-1-0": [0.5]}, "layer-head"),
        ({"0-0": [-0.5]}, "greater than or equal to 0"),
        ({"0-0": [0.5], "4294967296-0": [0.5]}, "layer-head"),
        ({"0": [0], "x": [0]}, "x"),
        ({"0": [-1]}, "greater than or equal to 0"),
        ({"99999": [0]}, "99999"),
        ({"0": [1 << 40]}, "less than"),
        ({"0": [True]}, "valid integer"),
        ({"0": []}, "at least one KV head"),
        (PHI3_SMALL | {"blocksparse_block_size": 0}, "blocksparse_block_size"),
        ({"blocksparse_block_size": 64}, "num_hidden_layers"),
        ({"hidden_size": 64}, "SeerAttention-R"),
        ({}, "MoA plan"),
        ([1, 2], "MoA plan"),
        ("", "MoA plan"),
        ("# a readme", "MoA plan"),
        (b"\xff\xfe{}", "MoA plan"),
        (b'{"\xff": 1}', "UTF-8"),
    ],
)
def test_json_that_is_not_exactly_right_is_refused(write: Write, content: Any, told: str) -> None:
    refused(write(content), told)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("0.5\t0.5\n0.5\n", "line[1]"),
        ("0.5\tnan\n", "finite number"),
        ("0.5\t3.5\n", "0.5 to 3.5"),
        ("0.5\t\n", "convert"),
    ],
)
def test_duo_tables_that_are_not_right_are_refused(write: Write, table: str, told: str) -> None:
    write(DUO_CONFIG, "config.json")
    refused(write(table, "full_attention_heads.tsv"), told)


def test_a_duo_table_needs_its_config(write: Write) -> None:
    path = write("0.5\t0.5\n", "full_attention_heads.tsv")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load(path)
    write({"sink_size": 128, "recent_size": -1}, "config.json")
    with pytest.raises(ArtifactError, match="recent_size"):
        load(path)
    write(DUO_CONFIG | {"model_name": "half a pair: \ud800"}, "config.json")
    with pytest.raises(ArtifactError, match="can't encode"):
        load(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.json", "no file of that name")
    refused(tmp_path, "empty", "MoA plan")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no file of that name")
    refused(tmp_path / ("x" * 300), "check the path")


def test_a_folder_with_several_patterns_is_refused(tmp_path: Path) -> None:
    for run in "ab":
        (tmp_path / run).mkdir()
        (tmp_path / run / "full_attention_heads.tsv").write_text("1\n")
    refused(tmp_path, "a/full_attention_heads.tsv, b/full_attention_heads.tsv", "give one of the files")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text('{"alphas": ')
    os.truncate(path, 1 << 28)  # sparse: takes no room
    refused(path, "at most 134217728 bytes")
