"""What is compared: policies written as `name[:key=value]...`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from loadtest.scenario import LoadTestError

PLUGIN_FREE = "vllm"  # vLLM alone, its plugins off


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy and its values."""

    policy: str
    pairs: tuple[str, ...] = ()  # key=value

    def __str__(self) -> str:
        return ":".join([self.policy, *self.pairs])

    @property
    def values(self) -> dict[str, Any]:
        """The pairs, numbers and lists as such."""
        return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in self.pairs)}


def settings(text: str) -> list[Setting]:
    """`tidal:reselect_layer=4,streaming`; a comma within brackets belongs to a value. LoadTestError for what is no list
    of policies, or names one twice."""
    found = [setting(part) for part in re.split(r",(?![^\[]*\])", text)]
    if len(set(found)) < len(found):
        raise LoadTestError(f"--policies {text} names a policy twice. Expected: each once.")
    return found


def setting(text: str) -> Setting:
    """One policy."""
    name, *pairs = text.split(":")
    if not name or not all("=" in pair for pair in pairs):
        raise LoadTestError(
            f"policy {text!r} is refused. Expected: name[:key=value]..., for example tidal:unit_tokens=32."
        )
    return Setting(name, tuple(pairs))
