"""All refusals, and the table that README.md has of them."""

from __future__ import annotations

from typing import Any

from sparseserve.plugin.support.arguments import ARGUMENTS, STARTED
from sparseserve.plugin.support.configuration import CACHE, FLAGS, PLANS
from sparseserve.plugin.support.cuda import CUDA
from sparseserve.plugin.support.head_memory import HEAD_MEMORY
from sparseserve.plugin.support.models import LAYERS, MODELS, ROTATIONS
from sparseserve.plugin.support.refusal import Refusal

REFUSALS: tuple[Refusal[Any], ...] = (
    *ARGUMENTS,
    *STARTED,
    *MODELS,
    *LAYERS,
    *ROTATIONS,
    *FLAGS,
    *CACHE,
    *CUDA,
    *HEAD_MEMORY,
    *PLANS,
)
HEAD = ("| feature | what is refused | expected in its place | remedy |", "|---|---|---|---|")
ON = {"": "", "cpu": " on the CPU", "cuda": " on CUDA"}


class _Gaps(dict[str, str]):
    """The gaps of a text as placeholders."""

    def __missing__(self, gap: str) -> str:
        return gap.upper()


def support_table() -> str:
    """Every refusal as a row of a Markdown table, what depends on the configuration in capitals."""
    return "\n".join([*HEAD, *map(_row, REFUSALS)]) + "\n"


def _row(refusal: Refusal[Any]) -> str:
    texts = refusal.key, refusal.allowed or f"one of {', '.join(refusal.choices)}", refusal.remedy
    key, allowed, remedy = (text.format_map(_Gaps()) for text in texts)
    return f"| {refusal.feature} | `{key}`{ON[refusal.platform]} | {allowed} | {remedy} |"
