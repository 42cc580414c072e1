"""One refusal: what is looked at, what is found, and what people are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from sparseserve.errors import Problem, UnsupportedError

USE_VLLM = "serve this model with vLLM itself"
WITHOUT_US = "serve this model without additional_config.sparseserve"


class Subject:
    """What refusals look at. Its attributes fill the gaps of their texts, by name; a policy is told by its name."""

    def __getitem__(self, gap: str) -> object:
        value = getattr(self, gap)
        return getattr(value, "name", value)


S = TypeVar("S", bound=Subject)


@dataclass(frozen=True, slots=True)
class Refusal(Generic[S]):
    """Something that a policy cannot be combined with."""

    feature: str  # for people; every refusal has its own
    key: str  # what has the value: a flag, a variable, a property of the model
    value: Callable[[S], object]  # that is refused; false where there is nothing to refuse
    allowed: str
    remedy: str
    where: Literal["launch", "worker", "both"] = "launch"  # who looks: the launcher before, the worker with the weights
    platform: Literal["", "cpu", "cuda"] = ""  # the only one that refuses it
    choices: tuple[str, ...] = ()  # in place of `allowed`

    def problem(self, subject: S) -> Problem | None:
        """The refusal of a subject; None where there is nothing to refuse."""
        value = self.value(subject)
        if not value:
            return None
        key, allowed, remedy = (text.format_map(subject) for text in (self.key, self.allowed, self.remedy))
        return Problem(key, value, allowed, self.choices, remedy)


def problems(refusals: Iterable[Refusal[S]], subject: S, platform: str = "") -> Iterator[Problem]:
    """What is refused of a subject on a platform."""
    for refusal in refusals:
        if refusal.platform in ("", platform) and (problem := refusal.problem(subject)):
            yield problem


def refuse(found: Iterable[Problem]) -> None:
    """Raise UnsupportedError with all that was found, if anything was."""
    if told := [*found]:
        raise UnsupportedError(*told)


def this_platform() -> str:
    """The platform that vLLM runs on: cpu, cuda or the name of another."""
    from vllm.platforms import current_platform

    names = {"cpu": current_platform.is_cpu(), "cuda": current_platform.is_cuda()}
    return next((name for name, here in names.items() if here), str(current_platform.device_name))
