"""Training of the gates: KL divergence to the dense model's block maxima, all layers together.

As SeerAttention-R (arXiv 2506.08889, section 3.2) trains them, with a larger learning rate and fewer rows: AdamW, warm
up, cosine. Layers share no weights, so their losses add up without touching each other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.special import xlogy

from sparseserve.calibration.chunks import Chunks, Tensors
from sparseserve.calibration.seer.data import Documents
from sparseserve.calibration.seer.gate import Gates
from sparseserve.errors import CalibrationError, Problem

DOCUMENTS = 2  # of a step, so that the loss falls smoothly
POINTS = 8  # of the run at which the held-out loss is measured and the training kept
WARM_UP = 20  # steps
FLOOR = 0.01  # of the learning rate, at the end


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean KL divergence in nats, summed over the layers."""

    train: list[float]  # of every step, on the documents it took
    steps: list[int]  # at which the held-out loss was measured: the start and the end of every part of the run
    held_out: Tensor  # [points, L] fp32


class Training:
    """Gates on their way, with their optimiser; `rope` [T, E] is that of the gates."""

    def __init__(self, gates: Gates, documents: Documents, chunks: Chunks, rope: Tensor | None) -> None:
        self.gates, self._documents, self._chunks, self._rope = gates, documents, chunks, rope
        self._names = documents.names("train")

    def run(self, steps: int, rate: float) -> Losses:
        """Train; goes on after the last part that an earlier run finished."""
        self._steps, self._rate = steps, rate
        self._optimiser = AdamW(self.gates.parameters(), weight_decay=0.0)
        train, held_out = list[Tensor](), [self.held_out_loss()]
        for state in self._chunks.run("training", [*map(str, range(POINTS))], self._part, _note):
            self._restore(state)
            train.append(state["train"])
            held_out.append(state["held_out"])
        return Losses(torch.cat(train).tolist(), self._ends(), torch.stack(held_out))

    @torch.no_grad()
    def held_out_loss(self) -> Tensor:
        """The mean loss [L] over the held-out documents."""
        names = self._documents.names("held-out")
        return torch.stack([self._loss(self._chunks.load("held-out", name)) for name in names]).mean(0).cpu()

    def shares(self, chunk: Tensors) -> Tensor:
        """The gates' log-softmax [L, R, H, N] on a document."""
        device = self.gates.key.device
        query, pooled, rows = (chunk[name].to(device) for name in ("query", "pooled", "rows"))
        shares: Tensor = self.gates(query.float(), pooled.float(), rows, self._documents.block, self._rope)
        return shares

    def _ends(self) -> list[int]:
        return [self._steps * part // POINTS for part in range(POINTS + 1)]

    def _part(self, name: str) -> Tensors:
        first, last = self._ends()[int(name) : int(name) + 2]
        train = torch.stack([self.step(step) for step in range(first, last)])
        return self._state() | {"train": train.cpu(), "held_out": self.held_out_loss()}

    def step(self, step: int) -> Tensor:
        """Take a step, and give its loss."""
        names = random.Random(f"{self._documents.seed} {step}").choices(self._names, k=DOCUMENTS)
        self._optimiser.param_groups[0]["lr"] = self._rate * _schedule(step, self._steps)
        self._optimiser.zero_grad()
        losses = torch.zeros(())
        for name in names:
            loss = self._loss(self._chunks.load("train", name)).sum() / DOCUMENTS
            loss.backward()
            losses = losses + loss.detach().cpu()
        self._optimiser.step()
        return losses

    def _loss(self, chunk: Tensors) -> Tensor:
        """The mean KL divergence [L] of the gates from the target."""
        shares = self.shares(chunk)
        target = chunk["target"].to(shares)
        target = target / target.sum(-1, keepdim=True)  # which half precision has rounded
        loss: Tensor = (xlogy(target, target) - target * shares.masked_fill(target == 0, 0)).sum(-1).mean((1, 2))
        if not loss.isfinite().all():
            remedy = "give a smaller --learning-rate; on float16 try --dtype float32"
            raise CalibrationError(Problem("loss", loss.tolist(), "finite in every layer", remedy=remedy))
        return loss

    def _state(self) -> Tensors:
        """Copies of the gates and of their moments, by name."""
        names = [name for name, _ in self.gates.named_parameters()]
        moments = self._optimiser.state_dict()["state"]
        flat = {f"{key} {name}": moments[i][key] for i, name in enumerate(names) for key in moments[i]}
        return {name: tensor.clone() for name, tensor in (self.gates.state_dict() | flat).items()}

    def _restore(self, state: Tensors) -> None:
        names = [name for name, _ in self.gates.named_parameters()]
        self.gates.load_state_dict({name: state[name] for name in names})
        groups: list[dict[str, Any]] = self._optimiser.state_dict()["param_groups"]
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = {i: {key: state[f"{key} {name}"] for key in keys} for i, name in enumerate(names)}
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first steps, then down along a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * (1 + cos(pi * step / steps)) / 2)


def _note(state: Tensors) -> str:
    return f"held-out loss {float(state['held_out'].sum()):.3f}"


def falls(losses: Sequence[float]) -> bool:
    """Whether a curve never rises."""
    return all(a >= b for a, b in zip(losses, losses[1:], strict=False))
