"""What the tensors and arguments of every kind of artifact must be, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from torch import Tensor

from sparseserve.artifacts.artifact import Artifact, Kind
from sparseserve.artifacts.model import Dim
from sparseserve.artifacts.read import MAX_LAYERS, MAX_TOKENS, Tokens, parse, refuse

Blocks = Annotated[int, Field(ge=1, le=1 << 20)]
BlockSize = Annotated[int, Field(ge=1, le=4096)]


class Arguments(BaseModel):
    """Arguments of one kind."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MoaArguments(Arguments):
    """Tokens of MoA's runtime."""

    sink: Tokens
    minimum: Tokens
    granularity: Annotated[int, Field(ge=1)]


class Rule(Arguments):
    """Which heads are retrieval heads: scores from `threshold` on, or the top `share`."""

    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    share: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Rule:
        if (self.threshold is None) == (self.share is None):
            raise ValueError("give either threshold or share")
        return self


class RetrievalArguments(Arguments):
    """What a head map's scores are and what their detector proposes."""

    scores: Literal["retrieval_head", "duo", "razor", "sparseserve"]
    per: Literal["query_head", "kv_head"]
    sink_tokens: Tokens | None
    recent_tokens: Tokens | None
    rule: Rule
    complete: bool = True


class SeerArguments(Arguments):
    """How the gates were trained, and the settings that came with them."""

    block_size: BlockSize
    gate_dim: Dim
    budget_tokens: Tokens
    threshold: Annotated[float, Field(ge=0, le=1)]
    method: Literal["threshold", "token_budget", "nz_ratio"]
    start_layer: Tokens
    use_rope: bool
    use_qk_norm: bool


class S2Arguments(Arguments):
    """The pattern, in blocks."""

    block_size: BlockSize
    num_local_blocks: Blocks
    vert_stride: Blocks
    homo_head: bool
    dense_every: Annotated[int, Field(ge=1, le=MAX_LAYERS)] | None


ARGUMENTS: dict[Kind, type[Arguments]] = {
    "moa": MoaArguments,
    "retrieval": RetrievalArguments,
    "seer": SeerArguments,
    "s2": S2Arguments,
}
FLOAT64 = (torch.float64,)
GATES = (torch.bfloat16, torch.float16, torch.float32)


def validate(artifact: Artifact, where: Path | str) -> None:
    """Raise ArtifactError unless the arguments and every tensor are what the kind demands."""
    arguments: TypeAdapter[Arguments] = TypeAdapter(ARGUMENTS[artifact.kind])
    parse(arguments, artifact.arguments, where, f"arguments of {artifact.kind}")
    shapes = _seer_shapes(artifact, where) if artifact.kind == "seer" else _shapes(artifact)
    for name in sorted(artifact.tensors.keys() ^ shapes.keys()):
        refuse(where, f"tensor {name}", "missing" if name in shapes else "not expected", f"tensors of {artifact.kind}")
    for name, tensor in artifact.tensors.items():
        _check_tensor(name, tensor, shapes[name], GATES if artifact.kind == "seer" else FLOAT64, where)
    if artifact.kind == "moa":
        _check_spans(artifact, where)


def _shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    names = {"moa": ("alpha", "beta"), "retrieval": ("scores",)}.get(artifact.kind, ())
    return dict.fromkeys(names, (artifact.layers, artifact.heads))


def _seer_shapes(artifact: Artifact, where: Path | str) -> dict[str, tuple[int, ...]]:
    if artifact.head_dim is None:
        refuse(where, "head dim", "missing", "the head dim of the model that the gates were trained for")
    first = artifact.tensors.get("query.0")
    if not isinstance(first, Tensor) or first.dim() != 4:
        refuse(where, "tensor query.0", _shape(first) if isinstance(first, Tensor) else "missing", "shape [H, G, D, E]")
    heads, group, dim, gate = artifact.heads, first.shape[1], artifact.head_dim, artifact.arguments["gate_dim"]
    shapes = {"query": (heads, group, dim, gate), "key": (heads, 3 * dim, gate)}
    if artifact.arguments["use_qk_norm"]:
        shapes |= {"query_norm": (gate,), "key_norm": (gate,)}
    return {f"{name}.{layer}": shape for layer in range(artifact.layers) for name, shape in shapes.items()}


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], where: Path | str
) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        refuse(where, f"tensor {name}", type(tensor).__name__, "a dense tensor on the CPU")
    if tensor.dtype not in dtypes:
        refuse(where, f"dtype of {name}", tensor.dtype, " or ".join(map(str, dtypes)))
    if tuple(tensor.shape) != shape:
        refuse(where, f"shape of {name}", _shape(tensor), " x ".join(map(str, shape)))
    if not tensor.isfinite().all():
        refuse(where, f"tensor {name}", "NaN or infinity", "finite numbers")


def _check_spans(artifact: Artifact, where: Path | str) -> None:
    """Spans are int32, and with beta <= 1 a token that a head has left behind is never needed again."""
    alpha, beta = artifact.tensors["alpha"], artifact.tensors["beta"]
    if alpha.abs().max() > MAX_TOKENS:
        refuse(where, "alpha", f"{float(alpha.abs().max()):g} tokens", f"at most {MAX_TOKENS} tokens")
    if beta.min() < 0 or beta.max() > 1:
        refuse(where, "beta", f"{float(beta.min()):g} to {float(beta.max()):g}", "0 to 1")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"
