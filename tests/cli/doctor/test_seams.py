"""Which names of vLLM our source is found to rely on."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import isclass
from pathlib import Path

import pytest

from sparseserve.cli.doctor.lookup import names
from sparseserve.cli.doctor.seams import seams
from tests.helpers.paths import ROOT

IMPORT = re.compile(r"^ *from (vllm[.\w]*) import (\([^)]*\)|[^\n(]*)", re.MULTILINE)


def found(folder: Path, **modules: str) -> dict[str, list[str]]:
    """The seams of a package made of these modules, and their lines."""
    (folder / "ours").mkdir()
    for name, source in modules.items():
        (folder / "ours" / f"{name}.py").write_text(source)
    ways: dict[str, list[str]] = {}
    for seam in seams(folder / "ours"):
        ways.setdefault(f"{seam.module} {seam.way}", []).append(seam.where)
    return ways


def test_every_import_from_vllm_is_a_seam() -> None:
    sources = [path.read_text() for path in (ROOT / "sparseserve").rglob("*.py")]
    imports = [(module, names) for source in sources for module, names in IMPORT.findall(source)]
    imported = {
        (module, name) for module, names in imports for name in re.findall(r"\w+", re.sub(r" as \w+", "", names))
    }
    assert len(imported) > 60
    assert imported <= {(seam.module, seam.way) for seam in seams()}


@pytest.mark.vllm
def test_everything_that_our_classes_override_is_a_seam() -> None:
    """By the classes as Python has them."""
    known = {name for seam in seams() for name, _ in names(seam.module, seam.way)}
    modules = {path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "sparseserve/plugin").rglob("*.py")}
    classes = {cls for parts in modules for cls in vars(import_module(".".join(parts))).values() if isclass(cls)}
    overridden = 0
    for cls in (cls for cls in classes if not any(cls in other.__mro__[1:] for other in classes)):  # that are made
        ours = [base for base in cls.__mro__ if base.__module__.startswith("sparseserve.")]
        theirs = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
        for name in {name for base in ours for name in vars(base) if not name.startswith("__") and name != "_abc_impl"}:
            if any(name in vars(base) for base in theirs):
                overridden += 1
                assert any(re.search(rf"\.{base.__name__}[.:]{name}$", way) for base in theirs for way in known), name
    assert overridden > 30


def test_each_seam_has_its_file_and_line(tmp_path: Path) -> None:
    source = (
        "import vllm.envs as envs\n\n\ndef f():\n    from vllm.a import (\n        one,\n        two as b,\n    )\n"
    )
    source += "    return envs.KEY\n"
    assert found(tmp_path, module=source) == {
        "vllm.envs ": ["ours/module.py:1"],
        "vllm.a one": ["ours/module.py:6"],
        "vllm.a two": ["ours/module.py:7"],
        "vllm.envs KEY": ["ours/module.py:9"],
    }


def test_what_a_class_does_not_define_is_its_base_s(tmp_path: Path) -> None:
    source = """
from vllm.a import Base

class Ours(Base):
    wanted = True
    mine = 1

    def __init__(self):
        super().__init__()
        self.own = self.theirs

    def asked_by_vllm(self):
        return self.own, self.mine, self.method(), self.helper()

    def helper(self):
        self.changed = 2

    def called(self):
        return super().called()
"""
    assert found(tmp_path, module=source).keys() == {
        "vllm.a Base",
        "vllm.a Base.wanted",
        "vllm.a Base^__init__",
        "vllm.a Base:theirs",
        "vllm.a Base.asked_by_vllm",
        "vllm.a Base:method",
        "vllm.a Base:changed",
        "vllm.a Base.called",
        "vllm.a Base^called",
    }


def test_a_class_that_is_mixed_in_relies_on_every_class_beside_it(tmp_path: Path) -> None:
    mixin = "class Mixin:\n    def run(self):\n        return super().run(self.theirs, self.ours)\n"
    uses = "from ours.mixin import Mixin\nfrom vllm.a import A, B\n"
    uses += "class OursA(Mixin, A):\n    ours = 1\nclass OursB(Mixin, B):\n    ours = 2\n"
    ways = found(tmp_path, mixin=mixin, uses=uses)
    names = {"", ".run", "^run", ":theirs"}
    assert ways.keys() == {f"vllm.a {base}{name}" for base in "AB" for name in names}
    assert ways["vllm.a A^run"] == ["ours/mixin.py:3"]


def test_fields_of_our_class_are_not_its_base_s(tmp_path: Path) -> None:
    source = "from vllm.a import Base\nclass Ours(Base):\n    more: int = 0\nOurs(field=1, more=2).more\n"
    assert found(tmp_path, module=source).keys() == {"vllm.a Base", "vllm.a Base(field)"}


def test_a_name_that_ours_calls_too_is_overridden_where_super_has_it(tmp_path: Path) -> None:
    source = "from vllm.a import A, B\nclass OursA(A):\n    def run(self):\n        return super().run()\n"
    source += "class OursB(B):\n    def run(self): ...\n"
    assert found(tmp_path, module=source).keys() >= {"vllm.a A^run", "vllm.a B.run"}


def test_attributes_of_our_objects_by_their_annotation(tmp_path: Path) -> None:
    source = "from vllm.a import A\nclass Ours:\n    def __init__(self, a: A):\n        self._a: A | None = a\n"
    source += "    def run(self):\n        return self._a.name\n"
    assert found(tmp_path, module=source) == {"vllm.a A": ["ours/module.py:1"], "vllm.a A:name": ["ours/module.py:6"]}
