"""A scenario: what is sent, how fast, and what counts as good. The contents of scenarios/*.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FOLDER = Path(__file__).parent / "scenarios"

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class LoadTestError(Exception):
    """A mistake of the user's, or a load test that cannot go on."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Documents(_Part):
    """A question about each document of its own; short ones among long ones where `lengths` says so."""

    kind: Literal["documents"]
    lengths: list[Positive] = Field(min_length=1)  # tokens of prompts, taken in turn


class Turns(_Part):
    """Conversations on one document that all share, a question at a time, each prompt with all turns before it."""

    kind: Literal["turns"]
    document: Positive  # tokens
    conversations: Positive


class Agents(_Part):
    """Agents whose context grows by what each step brought."""

    kind: Literal["agents"]
    start: Positive  # tokens of the first prompt
    step: Positive  # tokens that every step adds
    agents: Positive


class Reasoning(_Part):
    """Short prompts that are answered at length, whatever the model would stop at."""

    kind: Literal["reasoning"]
    length: Positive  # tokens of a prompt


Shape = Annotated[Documents | Turns | Agents | Reasoning, Field(discriminator="kind")]


class Load(_Part):
    """Either so many requests at a time or so many new ones a second (Poisson)."""

    concurrency: Positive | None = None
    request_rate: Rate | None = None

    @model_validator(mode="after")
    def _one(self) -> Load:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ValueError("a load is one of concurrency and request_rate")
        return self

    @property
    def name(self) -> str:
        """As reports and files name it."""
        return f"c{self.concurrency}" if self.concurrency else f"{self.request_rate:g}rps"

    @property
    def flags(self) -> list[str]:
        """For `vllm bench serve`."""
        return (
            ["--max-concurrency", str(self.concurrency)]
            if self.concurrency
            else ["--request-rate", f"{self.request_rate:g}"]
        )


class Objective(_Part):
    """A request is good when it keeps both; `vllm bench serve --goodput`."""

    ttft: Rate  # ms
    tpot: Rate  # ms


class Scenario(_Part):
    """One scenario."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    about: str
    prompts: Shape
    answers: Literal["needle", "control"]  # right is what holds the pass key, or begins as the control's answer
    same_characters: Positive | None = None  # that an answer must share with the control's
    share_right: float = Field(0.95, gt=0, le=1)  # of the control's right answers: fewer are an error
    output_tokens: Positive  # at most, with needles; exactly, against the control
    requests: Positive  # of every run
    loads: list[Load] = Field(min_length=1)
    slo: Objective
    warm_up: Positive  # requests before the first run of a server
    repeats: int = Field(ge=2)  # runs of a load: with one there is no interval
    seed: int = 0
    text: Path | None = None  # what prompts are made of; without, the language reference that ships with CPython

    @model_validator(mode="after")
    def _answers_fit(self) -> Scenario:
        if self.answers == "needle" and self.prompts.kind == "reasoning":
            raise ValueError("reasoning has no needles: answers is control")
        if (self.answers == "control") == (self.same_characters is None):
            raise ValueError("same_characters is given where answers is control, and only there")
        if len({load.name for load in self.loads}) < len(self.loads):
            raise ValueError("every load is given once")
        return self


def read_scenario(name: str) -> Scenario:
    """A scenario from a file, or the one of that name that ships; LoadTestError for anything else."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        content: Any = yaml.safe_load(path.read_text())
        return Scenario.model_validate(content)
    except FileNotFoundError:
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise LoadTestError(f"{name} is no scenario. Expected: a YAML file, or one of {shipped}.") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise LoadTestError(f"{path}: {error}") from None
