"""Looking names up without anything to run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparseserve.cli.doctor.lookup import names

SOURCE = """
from __future__ import annotations
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from nowhere import Hidden

class Settings(BaseModel):
    size: int

@dataclass
class Config:
    settings: Settings
    maybe: Settings | None
    anything: Any
    hidden: Hidden
    text: str

    @property
    def derived(self) -> Settings: ...

    def make(self) -> Config: ...

class Base(ABC):
    @abstractmethod
    def run(self): ...

class Derived(Base):
    def __init__(self):
        self.assigned = 1

def function(argument) -> Config: ...

def open_function(**arguments): ...
"""


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "looked_at").mkdir()
    (tmp_path / "looked_at" / "__init__.py").write_text(SOURCE)
    (tmp_path / "looked_at" / "sub.py").write_text("")
    (tmp_path / "looked_at" / "broken.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "looked_at"]:
        monkeypatch.delitem(sys.modules, name)


THERE = (
    "Config",
    "sub",
    "Config.make",
    "Config:text",
    "Config:settings:size",
    "Config:maybe:size",
    "Config:derived:size",
    "Config:make:settings:size",
    "function:settings",
    "Derived:assigned",
    "Derived:run",
    "function(argument)",
    "open_function(anything)",
    "Config(settings)",
    "Settings(size)",
)
MISSING = (
    "gone",
    "Config.gone",
    "Config:gone",
    "Config:settings:gone",
    "Config:maybe:gone",
    "Config:derived:gone",
    "Config:make:gone",
    "function:gone",
    "Derived^run",
    "function(gone)",
    "Config(gone)",
)
UNKNOWN = ("Config:anything:x", "Config:hidden:x", "Config:text:gone", "Derived:assigned:x", "open_function:x")


@pytest.mark.parametrize("way", THERE)
def test_what_is_there(way: str) -> None:
    assert [*names("looked_at", way)][-1] == (f"looked_at.{way}", True)


@pytest.mark.parametrize("way", MISSING)
def test_what_is_missing(way: str) -> None:
    assert [*names("looked_at", way)][-1] == (f"looked_at.{way.replace('^', '.')}", False)


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_cannot_be_judged_is_left_out(way: str) -> None:
    looked_up = dict(names("looked_at", way))
    assert all(looked_up.values()) and f"looked_at.{way}" not in looked_up


@pytest.mark.parametrize("module", ["looked_at.gone", "looked_at.broken"])
def test_modules_that_cannot_be_imported(module: str) -> None:
    assert [*names(module, "")] == [(module, False)]
    assert [*names(module, "name")] == [(f"{module}.name", False)]
