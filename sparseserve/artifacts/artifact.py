"""What a policy must know of a model's heads before serving, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import pad

from sparseserve.errors import ArtifactError, Problem
from sparseserve.model import ModelShape

Kind = Literal["moa", "retrieval", "seer", "s2"]


@dataclass(frozen=True)
class Artifact:
    """Tensors and arguments of one kind, of a model of `layers` layers; tensors keep the dtype they were stored in.

    kind       tensors                                          arguments
    moa        alpha, beta [L, Hq] fp64: a query head of a      sink, minimum, granularity: tokens
               row of N tokens spans alpha + beta N
    retrieval  scores [L, Hq or H] fp64, higher reads more      scores: retrieval_head | duo | razor | sparseserve;
                                                                per: query_head | kv_head;
                                                                sink_tokens, recent_tokens: tokens or None;
                                                                rule: {"threshold": x} or {"share": x};
                                                                complete: False if `layers` and `heads` are the
                                                                smallest that the file allows, see `resolve`
    seer       query.{l} [H, G, D, E], key.{l} [H, 3D, E],      block_size, gate_dim, budget_tokens, threshold,
               query_norm.{l}, key_norm.{l} [E] with            method: threshold | token_budget | nz_ratio,
               use_qk_norm                                      start_layer, use_rope, use_qk_norm
    s2         none                                             block_size, num_local_blocks, vert_stride, homo_head,
                                                                dense_every: layers or None
    """

    kind: Kind
    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    layers: int  # L
    heads: int  # of the per-head arrays: query heads (moa, s2, retrieval per query head) or KV heads
    source: str = ""  # what the source was recognised as, in one line
    sha256: str = ""  # of the source's bytes
    kv_heads: int | None = None  # H
    head_dim: int | None = None  # D
    model: str | None = None
    config_sha256: str | None = None  # of the model's config.json

    @property
    def query_heads(self) -> int | None:
        """Hq, where the artifact tells."""
        if self.kind in ("moa", "s2") or self.arguments.get("per") == "query_head":
            return self.heads
        return self.heads * self.tensors["query.0"].shape[1] if self.kind == "seer" else None

    @property
    def complete(self) -> bool:
        """Whether `layers` and `heads` are the model's, not the smallest that the source allows."""
        return bool(self.arguments.get("complete", True))

    def check(self, model: ModelShape) -> None:
        """Raise ArtifactError with everything in which the artifact does not fit the model."""
        if problems := list(self._mismatches(model)):
            raise ArtifactError(f"{self.source or self.kind} does not fit {model.name}.", *problems)

    def resolve(self, model: ModelShape) -> Artifact:
        """The artifact, checked, with what the source left out: a list of retrieval heads does not say how many heads
        there are, and few sources name their model."""
        self.check(model)
        kv_heads = self.kv_heads or _all_kv_heads(model)
        artifact = replace(
            self,
            kv_heads=kv_heads,
            head_dim=model.heads.head_dim,
            model=model.name,
            config_sha256=model.config_sha256 or self.config_sha256,
        )
        if self.complete or kv_heads is None:
            return artifact
        scores = pad(self.tensors["scores"], (0, kv_heads - self.heads, 0, model.layers - self.layers))
        arguments = self.arguments | {"complete": True}
        return replace(artifact, tensors={"scores": scores}, arguments=arguments, layers=model.layers, heads=kv_heads)

    def _mismatches(self, model: ModelShape) -> Iterator[Problem]:
        if not self.complete:
            yield from self._beyond(model)
            return
        kv_heads = self.kv_heads is None or model.fits_kv_heads(self.kv_heads)
        told = {
            "layers": (self.layers, model.layers),
            "query heads": (self.query_heads, model.heads.query_heads * model.ranks),
            "KV heads": (None if kv_heads else self.kv_heads, model.heads.kv_heads * model.ranks),
            "head dim": (self.head_dim, model.heads.head_dim),
            "sha256 of config.json": (self.config_sha256, model.config_sha256),
        }
        for what, (found, expected) in told.items():
            if found != expected and None not in (found, expected):
                remedy = f"take the artifact that was made for {model.name}"
                yield Problem(what, found, f"{expected}, as {model.name} has", remedy=remedy)

    def _beyond(self, model: ModelShape) -> Iterator[Problem]:
        kv_heads = _all_kv_heads(model)
        if kv_heads is None:
            remedy = "complete the list first: sparseserve convert LIST -o plan.safetensors --model config.json"
            yield Problem("KV heads", "not told by the list", "known where ranks may share a KV head", remedy=remedy)
        for what, found, most in (("layers", self.layers, model.layers), ("KV heads", self.heads, kv_heads)):
            if most is not None and found > most:
                yield Problem(what, f"at least {found}", f"at most {most}, as {model.name} has")


def _all_kv_heads(model: ModelShape) -> int | None:
    """KV heads of all ranks; None where a rank's one head may be the head of others too."""
    return None if model.heads.kv_heads == 1 < model.ranks else model.heads.kv_heads * model.ranks
