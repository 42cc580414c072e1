"""Ways to provoke a refusal: each is called with what a test has at hand, and raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from sparseserve.config import find_policy
from sparseserve.plugin.support.checks import check_arguments, check_attention, check_supported, cuda_problems
from sparseserve.plugin.support.refusal import refuse
from sparseserve.policies import Policy, Quest
from sparseserve.server.launch.flags import engine_config, parse
from sparseserve.server.launch.serve import Launch, prepare
from sparseserve.types import HeadShape
from tests.helpers.plugin.cuda_worker import MAX_LEN

HEADS = HeadShape(2, 2, 64)
PIECEWISE = SimpleNamespace(
    cudagraph_mode=SimpleNamespace(has_piecewise_cudagraphs=lambda: True),
    splitting_ops_contain_kv_cache_update=lambda: False,
)


@dataclass(frozen=True)
class Room:
    """What provocations work with."""

    models: dict[str, str]
    patch: pytest.MonkeyPatch
    folder: Path


@dataclass(frozen=True)
class Serve:
    """`sparseserve serve` of a model, in an environment and with names of our modules set to other values."""

    flags: tuple[str, ...] = ()
    model: str = "llama"
    policy: str = "quest"
    sets: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    patches: dict[str, object] = field(default_factory=dict)
    who: ClassVar = "launch"

    def __call__(self, room: Room) -> Launch:
        for name, text in self.env.items():
            room.patch.setenv(name, text)
        for place, value in self.patches.items():
            room.patch.setattr(place, value)
        source = find_policy(self.policy, self.sets, {})
        return prepare(source, [room.models[self.model], "--skip-tokenizer-init", *self.flags])


@dataclass(frozen=True)
class Arguments:
    """Arguments of `vllm serve` on CUDA."""

    flags: tuple[str, ...]
    who: ClassVar = "launch"

    def __call__(self, room: Room) -> None:
        check_arguments(parse(["model", *self.flags]), "cuda")


@dataclass(frozen=True)
class Changed:
    """The configuration of a small Llama, with other values in it, by their places."""

    values: dict[str, object]
    check: Callable[[Any, Policy], object] = check_supported
    who: str = "launch"

    def __call__(self, room: Room) -> None:
        config = engine_config(parse([room.models["llama"], "--skip-tokenizer-init"]))
        for place, value in self.values.items():
            *owners, name = place.split(".")
            owner: Any = config
            for part in owners:
                owner = getattr(owner, part)
            room.patch.setattr(owner, name, value, raising=False)  # some names are few models'
        self.check(config, Quest())


@dataclass(frozen=True)
class OnCuda:
    """A worker's configuration on CUDA."""

    changes: dict[str, Any] = field(default_factory=dict)
    heads: HeadShape = HEADS
    who: ClassVar = "worker"

    def __call__(self, room: Room) -> None:
        refuse(cuda_problems(cuda_config(**self.changes), Quest(), self.heads))


@dataclass(frozen=True)
class Attention:
    """A layer whose attention is plain, but for the changes."""

    changes: dict[str, Any] = field(default_factory=dict)
    who: ClassVar = "worker"

    def __call__(self, room: Room) -> None:
        plain = {"sliding_window": (-1, -1), "alibi_slopes": None, "logits_soft_cap": 0, "sinks": None}
        impl: Any = SimpleNamespace(**plain | {"kv_cache_dtype": "auto"} | self.changes)
        check_attention("layers.3.attn", impl)


@dataclass(frozen=True)
class Other:
    """Anything else."""

    provoke: Callable[[Room], object]
    who: str

    def __call__(self, room: Room) -> None:
        self.provoke(room)


def cuda_config(**changes: Any) -> Any:
    """As much of a VllmConfig as the checks read."""
    compilation = SimpleNamespace(cudagraph_mode=None)
    parts = {"dtype": torch.bfloat16, "page": 64, "speculative": None, "ubatching": False, "compilation": compilation}
    parts |= changes
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=parts["page"]),
        model_config=SimpleNamespace(dtype=parts["dtype"], max_model_len=MAX_LEN),
        parallel_config=SimpleNamespace(use_ubatching=parts["ubatching"]),
        speculative_config=parts["speculative"],
        compilation_config=parts["compilation"],
        use_v2_model_runner=False,
    )
