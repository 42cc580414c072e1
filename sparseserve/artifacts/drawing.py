"""The layer x head map as a picture; needs matplotlib."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparseserve.artifacts.artifact import Artifact
from sparseserve.artifacts.maps import head_map

LABEL = 3.6  # inches that the longest label of the scale needs


def draw_heads(artifact: Artifact, length: int, title: str = "") -> Figure:
    """What an artifact says about every head, at a row length of `length` tokens; ArtifactError for gates."""
    values, meaning = head_map(artifact, length)
    layers, heads = values.shape
    figure = Figure(figsize=(2.5 + 0.16 * heads, max(1.5 + 0.16 * layers, LABEL)), layout="constrained")
    axes = figure.add_subplot(xlabel="head", ylabel="layer", title=title)
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", vmin=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label=meaning)
    return figure
