"""Whatever holds an artifact, recognised by its content."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from sparseserve.artifacts import heads, moa, s2, seer
from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.format import load_ours
from sparseserve.artifacts.pickled import MAGIC, read_pickle
from sparseserve.artifacts.read import MAX_TENSOR_BYTES, check_size, read_json, refuse
from sparseserve.artifacts.schema import validate

ACCEPTED = (
    "our own .safetensors; a MoA plan (alphas, betas); Retrieval_Head scores (layer-head); a RazorAttention list "
    "(layer: KV heads, or prefix_matching and copying); a folder with full_attention_heads.tsv (DuoAttention, LServe), "
    "with attn_gate_weights.pth (SeerAttention-R), or with a config.json that has blocksparse_* (S2-Attention)"
)
CHECK_SOURCE = "check that the path is the right one and the download complete; for a config.json give its folder"
JSON_SOURCES = (
    (moa.recognise, moa.load),
    (heads.is_retrieval_head, heads.load_retrieval_head),
    (heads.is_razor, heads.load_razor),
    (s2.recognise, s2.load),
)
NUMBERS = re.compile(rb"[-+.0-9eE\tnaifNAIF\r\n]+")
PLANS = (heads.DUO_TSV, f"*/{heads.DUO_TSV}", seer.WEIGHTS, moa.PLAN_FILE, "config.json")  # what a folder may hold


def load(source: str | Path) -> Artifact:
    """The artifact in a file or folder: ours, or what the authors of a method published, as it is.

    Raises ArtifactError for everything that is not exactly one of the accepted forms.
    """
    path = Path(source)
    try:
        artifact = _load(_main_file(path) if path.is_dir() else path)
    except OSError as error:
        refuse(path, "file", error.strerror, "a file that can be read", "check the path and its permissions")
    validate(artifact, path)
    return artifact


def _main_file(folder: Path) -> Path:
    """The file of a folder that says what it is."""
    found = next((found for pattern in PLANS if (found := sorted(folder.glob(pattern)))), [])
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found or sorted(folder.iterdir()))
        refuse(folder, "folder", names or "empty", ACCEPTED, "give one of the files in it" if found else CHECK_SOURCE)
    return found[0]


def _load(path: Path) -> Artifact:
    check_size(path, MAX_TENSOR_BYTES)
    with path.open("rb") as file:
        start = file.read(64)
    if start[4:9] == b"\0\0\0\0{":  # safetensors: the length of its header in 8 bytes, then the header
        return load_ours(path)
    if start.startswith((MAGIC, b"\x80")):
        return _load_pickle(path)
    if start.lstrip().startswith((b"{", b"[")):
        return _load_json(path)
    if not NUMBERS.fullmatch(start):
        refuse(path, "content", start, ACCEPTED, CHECK_SOURCE)
    config = path.with_name("config.json")
    return replace(heads.load_duo(path, config), sha256=_sha256(path, config))


def _load_pickle(path: Path) -> Artifact:
    content = read_pickle(path)
    if {"prefix_matching", "copying"} & content.keys():
        return replace(heads.load_razor(content, path), sha256=_sha256(path))
    if any("attn_gate" in str(key) for key in content):
        config = path.with_name("config.json")
        return replace(seer.load(content, path, config), sha256=_sha256(path, config))
    refuse(path, "content", [*content], ACCEPTED, CHECK_SOURCE)


def _load_json(path: Path) -> Artifact:
    content = read_json(path)
    if isinstance(content, dict):
        for recognise, read in JSON_SOURCES:
            if recognise(content):
                return replace(read(content, path), sha256=_sha256(path))
    refuse(path, "JSON", [*content] if isinstance(content, dict) else "a list", ACCEPTED, CHECK_SOURCE)


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
