"""Errors that users meet; the CLI prints them without a traceback.

SparseServeError
├── ConfigError           a policy, a policy file or a flag is wrong
│   └── PolicyErrors      everything that is wrong with one policy
├── UnsupportedError      right by itself, but not with this model, flag or machine
├── KernelsNotBuiltError  the compiled kernels are missing
├── ArtifactError         an artifact cannot be read or does not fit the model
├── FileError             a file cannot be written
├── SelfCheckError       what a server computes is not what its policy says
├── CalibrationError      a model cannot be calibrated, or its numbers make no sense
└── TuningError           what was measured does not tell which policy to serve
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

MISSING: Final = object()  # the value of a key that is not there


@dataclass(frozen=True, slots=True)
class Problem:
    """One refused value, what is allowed in its place and what to do."""

    key: str
    value: object
    allowed: str = ""  # the choices when empty
    choices: Sequence[str] = ()
    remedy: str = ""
    where: str = ""  # the file, variable or flag that gave the value

    def __str__(self) -> str:
        refused = f"{self.key} is missing" if self.value is MISSING else f"{self.key} = {self.value} is refused"
        sentences = [
            f"{self.where}: {refused}" if self.where else refused,
            f"Expected: {self.allowed or 'one of ' + ', '.join(self.choices)}",
            f"Did you mean {self.nearest!r}" if self.nearest else "",
            f"Remedy: {self.remedy}" if self.remedy else "",
        ]
        return " ".join(f"{text}{'?' if text.startswith('Did') else '.'}" for text in sentences if text)

    @property
    def nearest(self) -> str | None:
        """The choice most like what was written: an unknown key resembles a key, a wrong value a value."""
        matches = (
            difflib.get_close_matches(word, self.choices, n=1, cutoff=0.5) for word in (self.key, str(self.value))
        )
        return next((match[0] for match in matches if match), None)


class SparseServeError(Exception):
    """Root of the errors that are the user's to solve."""

    def __init__(self, *messages: object) -> None:
        super().__init__("\n".join(map(str, messages)))


class ConfigError(SparseServeError):
    """A policy, a policy file or a flag is wrong."""

    def __init__(
        self,
        key: str,
        value: object,
        allowed: str = "",
        *,
        choices: Sequence[str] = (),
        remedy: str = "",
        where: str = "",
    ) -> None:
        self.problem = Problem(key, value, allowed, choices, remedy, where)
        super().__init__(self.problem)


class PolicyErrors(ConfigError):
    """Everything that is wrong with one policy."""

    def __init__(self, messages: Iterable[object]) -> None:
        SparseServeError.__init__(self, *messages)


class UnsupportedError(SparseServeError):
    """The policy cannot run with this model, flag or machine."""


class KernelsNotBuiltError(SparseServeError):
    """The compiled kernels are missing."""


class ArtifactError(SparseServeError):
    """An artifact cannot be read or does not fit the model."""


class FileError(SparseServeError):
    """A file cannot be written."""


class SelfCheckError(SparseServeError):
    """What a server computes is not what its policy says."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the check at start-up failed: {message}")


class CalibrationError(SparseServeError):
    """A model cannot be calibrated, or its numbers make no sense."""


class TuningError(SparseServeError):
    """What was measured does not tell which policy to serve."""


def policy_errors(error: ValidationError, model: type[BaseModel], where: Callable[[str], str]) -> PolicyErrors:
    """pydantic's findings in our words; `where` tells what gave a key its value."""
    return PolicyErrors(_message(details, model, where) for details in error.errors())


def _message(details: ErrorDetails, model: type[BaseModel], where: Callable[[str], str]) -> object:
    key = ".".join(map(str, details["loc"]))
    if not key:  # a rule over several keys, which its message names
        prefix = where("")
        return f"{prefix}: {details['ctx']['error']}." if prefix else f"{details['ctx']['error']}."
    if details["type"] == "extra_forbidden":
        return Problem(
            key,
            details["input"],
            choices=list(model.model_fields),
            remedy="remove or rename the key; `sparseserve policies` explains each",
            where=where(key),
        )
    name = str(details["loc"][0])  # the key of a list that holds the wrong value
    field = model.model_fields[name]
    missing = details["type"] == "missing"
    choices = _choices(field.annotation)
    return Problem(
        key,
        MISSING if missing else details["input"],
        allowed="" if choices else field.description or "" if missing else _allowed(details["msg"]),
        choices=choices,
        remedy=f"give --set {name}=VALUE, or {name}: VALUE in the policy file",
        where=where(name),
    )


def _allowed(message: str) -> str:
    return message.removeprefix("Input should be ")


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    return []
