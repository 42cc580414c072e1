"""Who may import what, and how long a file may be."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.imports import circle, modules, ours, packages
from tests.helpers.paths import ROOT

# Packages of others that only these folders import.
ALLOWED = {
    "vllm": {"plugin", "server", "vllm_version.py"},
    "transformers": {"calibration", "demo"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "typer": {"cli"},
}
# Each room, and the rooms that it may import, for types, too. What is not listed is not imported: nothing but tests and
# kernels/bench imports testing, and the middle (policies to decode) knows neither vLLM's rooms nor those of the tools.
ROOMS = {
    "errors": "",
    "types": "",
    "questions": "",
    "vllm_version": "",
    "files": "errors",
    "environment": "errors",
    "model": "errors types",
    "artifacts": "errors files model types",
    "ops": "errors types",
    "reference": "types",
    "policies": "artifacts errors model ops types",
    "config": "environment errors policies",
    "request_options": "errors policies",
    "footprint": "model policies types",
    "decode": "ops policies types",
    "plugin": "config decode environment errors footprint model ops policies reference request_options types "
    "vllm_version",
    "server/announce": "environment",
    "server/front": "environment errors plugin policies request_options server/announce",
    "server/launch": "config environment errors footprint model ops plugin policies request_options types vllm_version",
    "server/views": "config environment errors footprint model plugin policies request_options server/front "
    "server/launch types",
    "server/__main__": "server/launch",
    "calibration": "artifacts errors files model policies questions reference types",
    "evaluation": "config environment errors files policies questions server/launch vllm_version",
    "tuning": "artifacts config errors evaluation files policies server/launch",
    "demo": "artifacts policies questions server/launch",
    "testing": "artifacts decode demo model ops policies reference types",
    "cli": "artifacts calibration config demo errors evaluation files footprint ops policies questions server/launch "
    "tuning vllm_version",
    "__main__": "cli",
}
SOURCES = [*modules().values()]


def room(module: str) -> str:
    """The folder of a module; a module of its own where it stands beside folders."""
    _, *parts = module.split(".")
    return "/".join(parts[: 2 if parts[:1] == ["server"] else 1])


def test_a_room_imports_what_it_may() -> None:
    imports = {(room(name), room(other)) for name, path in modules().items() for other in ours(path)}
    allowed = {(name, other) for name, others in ROOMS.items() for other in others.split()}
    assert {(name, other) for name, other in imports - allowed if other not in ("", name)} == set()


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in modules()} - {"", "server"} == ROOMS.keys()


def test_no_modules_import_each_other() -> None:
    """At any time: imports in functions count, too."""
    assert circle({name: ours(path, typing=False) for name, path in modules().items()}) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    sources = {
        "a": "if TYPE_CHECKING:\n    from sparseserve import model",
        "b": "def f():\n    from sparseserve.types import CPU",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    assert ours(tmp_path / "a") == {"sparseserve.model"} and ours(tmp_path / "a", typing=False) == set()
    assert ours(tmp_path / "b", typing=False) == {"sparseserve.types"}
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_is_imported_in_its_folders_only(package: str) -> None:
    users = {path.relative_to(ROOT / "sparseserve").parts[0] for path in SOURCES if package in packages(path)}
    assert users <= ALLOWED[package]


def test_loadtest_speaks_http_only() -> None:
    """To sparseserve; vLLM is its client."""
    found = {path.name: packages(path) & {"sparseserve", "vllm"} for path in (ROOT / "loadtest").rglob("*.py")}
    assert {name: packages for name, packages in found.items() if packages} == {"vllm_bench.py": {"vllm"}}


def test_the_middle_needs_no_vllm() -> None:
    """Everything but plugin/ and server/ imports where vLLM is absent."""
    block = "import sys; sys.modules['vllm'] = None; "
    modules = (
        "sparseserve.policies, sparseserve.decode.layer, sparseserve.config, sparseserve.reference, sparseserve.cli"
    )
    subprocess.run([sys.executable, "-c", f"{block}import {modules}"], check=True)


def test_files_stay_short() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = [ROOT / name for name in tracked if name.endswith((".py", ".cpp", ".h", ".cu"))]
    assert code and not [path for path in code if path.exists() and len(path.read_text().splitlines()) > 400]
