"""The artifact that a policy reads."""

from __future__ import annotations

from sparseserve import artifacts
from sparseserve.artifacts import Artifact, Kind
from sparseserve.errors import ArtifactError, Problem


def load_artifact(source: str, kind: Kind) -> Artifact:
    """The artifact, which must be of the kind that a policy reads."""
    artifact = artifacts.load(source)
    if artifact.kind != kind:
        allowed = f"an artifact of the kind {kind}"
        raise ArtifactError(Problem("artifact", source, allowed, remedy=f"serve it with --policy {artifact.kind}"))
    return artifact
