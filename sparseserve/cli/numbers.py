"""Numbers in options, separated by commas."""

from __future__ import annotations

from sparseserve.errors import ConfigError

REMEDY = "separate them by commas"


def whole_numbers(key: str, text: str, least: int = 1) -> list[int]:
    """The numbers of an option such as --lengths 2048,8192; ConfigError for anything else."""
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(numbers) < least:
        raise ConfigError(key, text, f"whole numbers from {least} on, for example 4096,32768", remedy=REMEDY)
    return numbers


def shares(key: str, text: str) -> list[float]:
    """The numbers from 0 to 1 of an option such as --depths 0.1,0.5; ConfigError for anything else."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 1 for number in numbers):
        raise ConfigError(key, text, "numbers from 0 to 1, for example 0.1,0.5", remedy=REMEDY)
    return numbers
