"""Who may import what, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ALLOWED = {"vllm": {"plugin", "server"}, "transformers": {"calibration", "demo"}}
SOURCES = [*(ROOT / "sparseserve").rglob("*.py")]


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in plain | froms}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_is_imported_in_its_folders_only(package: str) -> None:
    users = {path.relative_to(ROOT / "sparseserve").parts[0] for path in SOURCES if package in imported(path)}
    assert users <= ALLOWED[package]


def test_loadtest_speaks_http_only() -> None:
    """To sparseserve; vLLM is its client."""
    found = {path.name: imported(path) & {"sparseserve", "vllm"} for path in (ROOT / "loadtest").rglob("*.py")}
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
