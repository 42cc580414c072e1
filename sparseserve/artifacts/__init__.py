"""What is known of a model's heads before serving: published plans, head maps and gates, and our one-file form."""

from sparseserve.artifacts.artifact import Artifact, Kind
from sparseserve.artifacts.format import save
from sparseserve.artifacts.maps import head_map, headline, moa_density
from sparseserve.artifacts.model import read_model
from sparseserve.artifacts.sources import load

__all__ = ["Artifact", "Kind", "head_map", "headline", "load", "moa_density", "read_model", "save"]
