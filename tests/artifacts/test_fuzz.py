"""Whatever is in a file: an artifact or an ArtifactError, nothing else."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseserve.artifacts import Artifact, load, save
from sparseserve.errors import ArtifactError

many = settings(max_examples=150, deadline=None, derandomize=True)
GATE = "model.layers.0.self_attn.attn_gate.attngate_linear_q.weight"
CONFIG = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "seerattn_gate_hidden_size": 2,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "sink_size": 1,
    "recent_size": 1,
    "model_name": "tiny",
    "base_model": "tiny",
}
words = st.sampled_from(
    ["alphas", "betas", "0", "1", "0-0", "0-1", "1-0", "prefix_matching", "copying", GATE, *CONFIG, "text_config"]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, 1 << 31, 1 << 63, 1 << 400, 1e308, True])
values = st.recursive(
    st.none() | numbers | st.text(st.characters(), max_size=5) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def survives(content: bytes, name: str, config: bytes = json.dumps(CONFIG).encode()) -> None:
    """Loading ends in an artifact that can be saved, or in an ArtifactError."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(config)
        (Path(folder) / name).write_bytes(content)
        for source in (Path(folder), Path(folder) / name):
            with contextlib.suppress(ArtifactError):
                artifact = load(source)
                assert isinstance(artifact, Artifact)
                save(artifact, Path(folder) / "again")


def pickled(content: Any) -> bytes:
    """A file of torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def ours() -> bytes:
    """A file of ours."""
    with TemporaryDirectory() as folder:
        tensors = {"alpha": torch.zeros(2, 2).double(), "beta": torch.ones(2, 2).double()}
        arguments = {"sink": 64, "minimum": 128, "granularity": 64}
        save(Artifact("moa", tensors, arguments, 2, 2), Path(folder) / "plan")
        return (Path(folder) / "plan").read_bytes()


def gates() -> bytes:
    """A SeerAttention checkpoint."""
    shapes = {"linear_q": (1, 2, 2, 2), "linear_k": (1, 6, 2)}
    prefix, suffix = GATE.split("linear_q")
    return pickled({prefix + name + suffix: torch.zeros(shape) for name, shape in shapes.items()})


WRITERS: dict[str, Callable[[], bytes]] = {
    "plan.safetensors": ours,
    "attn_gate_weights.pth": gates,
    "heads.pt": lambda: pickled({"prefix_matching": {0: [1]}, "copying": {1: [0]}}),
    "full_attention_heads.tsv": lambda: b"1.00e+00\t2.5e-01\n-1.0e-03\t0\n",
    "moa_alpha_beta.json": lambda: b'{"alphas": [[0, -1024.0]], "betas": [[0.5, 1]]}',
    "scores.json": lambda: b'{"0-0": [0.5, 1], "0-1": [0, 0.25]}',
    "razor.json": lambda: b'{"0": [1, 2], "7": []}',
    "config.json": lambda: json.dumps(CONFIG).encode(),
}
VALID = {name: writer() for name, writer in WRITERS.items()}


def test_the_files_that_are_damaged_below_are_good() -> None:
    for name, content in VALID.items():
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_bytes(VALID["config.json"])
            (Path(folder) / name).write_bytes(content)
            assert load(Path(folder) / name).sha256 is not None


@many
@given(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"{", b"[", b"1.0\t", b"\x10\0\0\0\0\0\0\0{"]), st.binary())
def test_any_bytes(start: bytes, rest: bytes) -> None:
    survives(start + rest, "plan.json")


@many
@given(
    st.sampled_from(sorted(VALID)), st.lists(st.tuples(st.integers(0), st.binary(max_size=3)), max_size=3), st.data()
)
def test_good_files_with_damage(name: str, edits: list[tuple[int, bytes]], data: st.DataObject) -> None:
    content = bytearray(VALID[name])
    for place, replacement in edits:
        at = place % len(content)
        content[at : at + len(replacement)] = replacement
    survives(bytes(content[: data.draw(st.integers(1, len(content)), "kept")]), name)


@many
@given(st.dictionaries(words, values, max_size=4) | values)
def test_any_json(content: Any) -> None:
    survives(json.dumps(content).encode(), "plan.json")


@many
@given(
    st.dictionaries(words, values, max_size=3), st.sampled_from(["attn_gate_weights.pth", "full_attention_heads.tsv"])
)
def test_any_config_beside_good_files(changes: dict[str, Any], name: str) -> None:
    survives(VALID[name], name, json.dumps(CONFIG | changes).encode())


tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
)
odd = st.sampled_from([torch.zeros(2, device="meta"), torch.zeros(2, 2).to_sparse(), torch.nn.Parameter(torch.ones(2))])


@many
@given(st.dictionaries(words | st.integers(0, 3), values | tensors | odd, max_size=4) | values)
def test_any_pickled_data(content: Any) -> None:
    survives(pickled(content), "attn_gate_weights.pth")


@many
@given(
    st.sampled_from(["format", "policy", "arguments", "layers", "heads", "kv_heads", "source_sha256"]), values | words
)
def test_any_metadata(key: str, value: Any) -> None:
    data = VALID["plan.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"][key] = value if isinstance(value, str) else json.dumps(value)
    text = json.dumps(header).encode()
    survives(len(text).to_bytes(8, "little") + text + data[end:], "plan.safetensors")
