"""What `sparseserve eval` is asked for, and the command that asks for it, or for a part of it, again."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sparseserve import environment
from sparseserve.config import load_policy, to_dict
from sparseserve.errors import ConfigError
from sparseserve.policies import POLICIES, Policy
from sparseserve.questions.tasks import TASKS

RERUN = "rerun.json"  # where the commands for parts write


class Setting(BaseModel):
    """A policy with --set values; as text `name[:key=value]...`."""

    model_config = ConfigDict(frozen=True)

    policy: str
    pairs: tuple[str, ...] = ()  # KEY=VALUE

    def __str__(self) -> str:
        return ":".join([self.policy, *self.pairs])

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Raises ConfigError for a policy or a value that does not exist."""
        name, *pairs = text.strip().split(":")
        setting = cls(policy=name, pairs=tuple(pairs))
        setting.load()
        return setting

    def load(self) -> Policy:
        """The policy; ConfigError when a value is wrong."""
        if self.policy not in POLICIES:
            remedy = "see `sparseserve policies`"
            raise ConfigError("--policies", self.policy, choices=list(POLICIES), remedy=remedy)
        return load_policy(self.policy, self.pairs, {}, "*")

    def values(self) -> dict[str, Any]:
        """The values that the pairs give, JSON-able."""
        given = [pair.partition("=")[0].strip().replace("-", "_") for pair in self.pairs]
        return {key: value for key, value in to_dict(self.load()).items() if key in given}

    def at(self, budget: int) -> Setting:
        """With a budget in tokens, where the policy takes one and none is given."""
        given, wanted = self.values(), self.load().at_budget(budget)
        pairs = [f"{key}={value}" for key, value in wanted.items() if key not in given]
        return Setting(policy=self.policy, pairs=(*self.pairs, *pairs))

    def with_pair(self, pair: str) -> Setting:
        """With one more value."""
        return Setting(policy=self.policy, pairs=(*self.pairs, pair))

    def flags(self) -> list[str]:
        """As `sparseserve serve` takes it."""
        return ["--policy", self.policy, *(word for pair in self.pairs for word in ("--set", pair))]


def settings(policies: str, budgets: Sequence[int]) -> tuple[Setting, ...]:
    """Policies as text, each with each budget: `dense,quest` at 512 and 1024 are three settings.

    A comma within brackets belongs to a value. Raises ConfigError.
    """
    named = [Setting.parse(text) for text in re.split(r",(?![^\[]*\])", policies)]
    found = tuple(dict.fromkeys(one for setting in named for one in _multiplied(setting, budgets)))
    for setting in found:
        setting.load()
    return found


def _multiplied(setting: Setting, budgets: Sequence[int]) -> list[Setting]:
    return [setting.at(budget) for budget in budgets] if budgets else [setting]


class Evaluation(BaseModel):
    """An evaluation; equal requests ask equal questions."""

    model_config = ConfigDict(frozen=True)

    model: str
    settings: tuple[Setting, ...]
    lengths: tuple[int, ...]  # tokens of a prompt
    tasks: tuple[str, ...] = tuple(TASKS)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    samples: int = 10  # questions of a cell, and at most so many stretches of the text
    text: str | None = None  # file
    recall: bool = True  # a second server for each setting, which measures it
    seed: int = 0
    vllm: tuple[str, ...] = ()  # options of vllm serve

    def check(self) -> None:
        """Raise ConfigError for what can be known to be wrong before a server starts."""
        if self.model.startswith("-"):
            raise ConfigError("MODEL", self.model, "the model, before any option", remedy="write MODEL first")
        for flag, given in (("--lengths", self.lengths), ("--depths", self.depths), ("--tasks", self.tasks)):
            if not given:
                raise ConfigError(flag, "nothing", "at least one", remedy=f"give {flag}, or leave it out")
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError("--tasks", task, choices=list(TASKS), remedy="give one of these, or leave it out")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ConfigError("--depths", depth, "parts of the document, 0 to 1", remedy="give for example 0.1,0.9")
        for flag, number in [("--samples", self.samples), *(("--lengths", length) for length in self.lengths)]:
            if number < 1:
                raise ConfigError(flag, number, "at least 1", remedy="give a whole number from 1 on")
        if self.seed < 0:
            raise ConfigError("--seed", self.seed, "0 or more", remedy="give a whole number from 0 on")
        _check_environment()
        self.read_text()

    def read_text(self) -> str | None:
        """The user's text, None without; ConfigError for a file that cannot be read or is empty."""
        if self.text is None:
            return None
        try:
            text = Path(self.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("--text", self.text, "a text file", remedy=f"check the path ({error})") from None
        if not text.strip():
            raise ConfigError("--text", self.text, "a file with text in it", remedy="give another file")
        return text

    def command(self, output: str) -> str:
        """The shell command."""
        words = ["sparseserve", "eval", self.model, "--policies", ",".join(map(str, self.settings))]
        words += ["--tasks", ",".join(self.tasks), "--lengths", ",".join(map(str, self.lengths))]
        words += ["--depths", ",".join(f"{depth:g}" for depth in self.depths)]
        words += ["--samples", str(self.samples), "--seed", str(self.seed)]
        words += [] if self.text is None else ["--text", self.text]
        words += [] if self.recall else ["--no-recall"]
        return shlex.join([*words, "--output", output, *self.vllm])

    def part(self, **changes: Any) -> str:
        """The command for a part of the request."""
        return self.model_copy(update=changes).command(RERUN)


def _check_environment() -> None:
    for name in os.environ:
        if name.startswith(environment.SET):
            remedy = f"unset {name}, and write the value behind the policy: quest:budget_tokens=512"
            raise ConfigError(name, os.environ[name], "unset: it would reach every setting", remedy=remedy)
