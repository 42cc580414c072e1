"""The documents that gates are trained and measured on, kept as chunks on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseserve.calibration.chunks import Chunks, Tensors
from sparseserve.calibration.samples import document, text_sha256
from sparseserve.calibration.seer.features import draw_rows, features
from sparseserve.calibration.subject import Subject
from sparseserve.errors import CalibrationError, Problem

PARTS = {"train": (0.0, 0.9), "held-out": (0.9, 1.0)}  # of the text: no held-out token is trained on
LEAST_BLOCKS = 16  # in the shortest document, so that its rows have at least 8 blocks to choose from


@dataclass(frozen=True, slots=True)
class Documents:
    """What to show of the model; the options of `calibrate seer`."""

    lengths: Sequence[int]  # tokens of a document
    samples: int  # documents of each length to train on
    held_out: int  # documents of each length to measure on
    rows: int  # query positions of each document
    block: int  # tokens
    seed: int = 0
    text: Path | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self) | {"lengths": [*self.lengths], "text": text_sha256(self.text)}

    def names(self, part: str) -> list[str]:
        """The documents of "train" or "held-out"."""
        count = self.samples if part == "train" else self.held_out
        return [f"{length}-{index}" for index in range(count) for length in self.lengths]

    def check(self, subject: Subject) -> None:
        """Raise CalibrationError for blocks that the kernels do not compute and lengths that do not fit."""
        if self.block % 16:
            raise CalibrationError(Problem("--block-size", self.block, "a multiple of 16", remedy="give 16, 32 or 64"))
        subject.check_length("--lengths", max(self.lengths))
        least = LEAST_BLOCKS * self.block
        if min(self.lengths) < least:
            allowed = f"at least {least} tokens, {LEAST_BLOCKS} blocks of {self.block}"
            remedy = "give larger --lengths or a smaller --block-size"
            raise CalibrationError(Problem("--lengths", min(self.lengths), allowed, remedy=remedy))

    def collect(self, subject: Subject, chunks: Chunks, part: str, unrope: Tensor) -> None:
        """Pass every document of a part through the model and keep what gates need of it.

        A chunk holds rows [R] int64; query [L, R, Hq, D], pooled [L, H, N, 3D], target [L, R, H, N] fp16; held-out ones
        also mass and mean_key [L, R, H, N] fp32. N blocks lie whole in the document.
        """

        def compute(name: str) -> Tensors:
            length, index = map(int, name.split("-"))
            drawn = 2 * (self.seed + index) + (part == "train")
            ids = document(subject, length, drawn, self.text, PARTS[part])
            rows = draw_rows(length, self.rows, drawn).to(subject.device)
            layers = features(subject, ids, rows, self.block, unrope)
            halves = {name: _stacked(layers, name).half() for name in ("query", "pooled", "target")}
            measured = () if part == "train" else ("mass", "mean_key")
            return {"rows": rows} | halves | {name: _stacked(layers, name) for name in measured}

        for _ in chunks.run(part, self.names(part), compute):
            pass


def _stacked(layers: Sequence[object], name: str) -> Tensor:
    return torch.stack([getattr(layer, name) for layer in layers])
