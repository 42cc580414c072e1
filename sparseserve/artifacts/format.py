"""Our one-file form: a safetensors file whose metadata say everything that its tensors do not."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from sparseserve.artifacts.artifact import Artifact, Kind
from sparseserve.artifacts.read import MAX_HEADS, MAX_LAYERS, MAX_TENSOR_BYTES, check_size, parse, parse_json, refuse
from sparseserve.artifacts.schema import validate
from sparseserve.files import write_atomically

FORMAT = "sparseserve-artifact/1"
OURS = "an artifact that `sparseserve convert` or `sparseserve calibrate` wrote"
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]


class Metadata(BaseModel):
    """The metadata of the file: strings all, for safetensors has nothing else."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["sparseserve-artifact/1"]
    policy: Kind
    arguments: str  # JSON
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    heads: Annotated[int, Field(ge=1, le=MAX_HEADS)]
    source: str
    source_sha256: Sha256
    tool_version: str
    kv_heads: Annotated[int, Field(ge=1, le=MAX_HEADS)] | None = None
    head_dim: Annotated[int, Field(ge=1)] | None = None
    model: str | None = None
    config_sha256: Sha256 | None = None


METADATA = TypeAdapter(Metadata)


def save(artifact: Artifact, path: str | Path) -> None:
    """Write the artifact to one file; the same artifact gives the same bytes."""
    validate(artifact, path)
    metadata = {
        "format": FORMAT,
        "policy": artifact.kind,
        "arguments": json.dumps(artifact.arguments, sort_keys=True, allow_nan=False),
        "layers": artifact.layers,
        "heads": artifact.heads,
        "source": artifact.source,
        "source_sha256": artifact.sha256,
        "tool_version": version("sparseserve"),
        "kv_heads": artifact.kv_heads,
        "head_dim": artifact.head_dim,
        "model": artifact.model,
        "config_sha256": artifact.config_sha256,
    }
    tensors = {name: tensor.contiguous() for name, tensor in artifact.tensors.items()}
    data = to_safetensors(tensors, {key: str(value) for key, value in metadata.items() if value is not None})
    write_atomically(path, _sorted_header(data))


def load_ours(path: Path) -> Artifact:
    """The artifact that `save` wrote; its tensors are still to be validated."""
    check_size(path, MAX_TENSOR_BYTES)
    strings, tensors = _read(path)
    if "format" in strings and strings["format"] != FORMAT:
        remedy = "upgrade sparseserve, or convert the source again"
        refuse(path, "format", strings["format"], FORMAT, remedy)
    metadata = parse(METADATA, strings, path, OURS)
    arguments = parse_json(metadata.arguments, path)
    return Artifact(
        metadata.policy,
        tensors,
        arguments,
        metadata.layers,
        metadata.heads,
        metadata.source,
        metadata.source_sha256,
        metadata.kv_heads,
        metadata.head_dim,
        metadata.model,
        metadata.config_sha256,
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return metadata, from_safetensors(path.read_bytes())  # not mapped: the file may change while we serve
    except Exception as error:  # SafetensorError, or what torch raises for a dtype that it does not have
        refuse(path, "safetensors", error, OURS, "convert the source again")


def _sorted_header(data: bytes) -> bytes:
    """safetensors writes the metadata in random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + data[end:]
