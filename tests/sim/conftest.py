from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.sim_programs import FLAGS, PROGRAMS, SANITIZERS, SIMULATOR, Run, compile_programs


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Path of every program; that of mistakes.cu with sanitizers is named "checked"."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sim")
    engine, kernels = sorted(SIMULATOR.glob("engine/*.cpp")), sorted(PROGRAMS.glob("*.cu"))
    plain = compile_programs(compiler, engine + kernels, FLAGS, folder / "plain")
    checked = compile_programs(compiler, [*engine, PROGRAMS / "mistakes.cu"], FLAGS + SANITIZERS, folder / "checked")
    return plain | {"checked": checked["mistakes"]}


@pytest.fixture(scope="session")
def run(programs: dict[str, Path]) -> Run:
    # vLLM, once imported, preloads its allocator into children; AddressSanitizer must come first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run_program(
        name: str, *arguments: str, order: str = "forward", threads: int = 2, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        settings = {
            "SPARSESERVE_SIM_ORDER": order,
            "SPARSESERVE_SIM_THREADS": str(threads),
            "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        }
        return subprocess.run(
            [programs[name], *arguments], env=environment | settings, input=stdin, capture_output=True, timeout=60
        )

    return run_program
