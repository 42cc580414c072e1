"""What `sparseserve eval` found: the contents of RESULTS.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Record):
    """One task at one length and depth under one setting."""

    task: str
    length: int  # tokens of the prompt
    depth: float | None  # where in the document the answer lies, 0 to 1; None for tasks without a place
    asked: int  # questions
    scores: list[float]  # [asked], share of the expected strings that each answer held, 0 to 1
    score: float  # their mean
    low: float  # of its 95 % confidence interval
    high: float
    command: str  # asks these questions again


class AtLength(_Record):
    """What one setting reads, keeps and costs at one context length."""

    length: int  # tokens
    density: float | None  # KV tokens attended / resident in decode steps, mean over query heads; None as below
    ms_per_token: float | None  # median over answers of the mean time from token to token, one request at a time
    timed_tokens: int  # so many times from token to token are in it
    recall: list[float] | None  # [L], softmax mass that a layer's heads keep, with kv_memory=shared; None without steps
    bits_per_byte: float | None  # of the user's text through decoding; None without a text
    scored_bytes: int  # of that text
    command: str  # measures these numbers again


class SettingResult(_Record):
    """A policy with its values, in a server of its own."""

    policy: str
    values: dict[str, Any]  # as given with --set, JSON-able
    command: str  # runs this setting again
    lengths: list[AtLength]
    cells: list[Cell]


class Results(_Record):
    """RESULTS.json."""

    model: str
    config_sha256: str | None  # of the model's config.json; None for one that is not on this machine
    command: str  # runs everything again
    seed: int
    date: str  # UTC, ISO 8601
    versions: dict[str, str]  # of sparseserve and of what it runs on
    settings: list[SettingResult]
