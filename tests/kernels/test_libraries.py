"""What the compiled libraries need of torch and of a GPU: old torches load them, and no kernel spills."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ENTRY = re.compile(r"Compiling entry function '(\w+)' .*?\n.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
                   r"(\d+) bytes spill loads\n.*?Used (\d+) registers", re.S)  # fmt: skip
# Of the widest kernel of a file.
REGISTERS = {
    "attend": 252,
    "gates": 96,
    "score_pages": 178,
    "score_tokens": 168,
    "search_blocks": 128,
    "select_units": 40,
    "summarize_pages": 48,
}


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CUDA library, and what the compiler said."""
    if NVCC is None:
        pytest.skip("nvcc is not here: the CUDA kernels were not compiled")
    folder = tmp_path_factory.mktemp("cuda")
    options = ["-DSPARSESERVE_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run([cmake, "-S", KERNELS, "-B", folder, *options], check=True, capture_output=True)
    build = subprocess.run([cmake, "--build", folder, "--target", "_C_cuda", "-j"], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder / "cuda" / "_C_cuda.so", build.stdout + build.stderr


def shims(library: Path) -> set[str]:
    """What a library wants of torch."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    return set(re.findall(r"\b(?:aoti_)?torch_\w+", symbols.stdout))


def known() -> set[str]:
    return set((KERNELS / "bindings" / "torch-2.11-shims.txt").read_text().split())


def test_the_cpu_library_needs_no_torch_after_2_11() -> None:
    spec = find_spec("sparseserve._C_cpu")
    assert spec is not None and spec.origin is not None
    needed = shims(Path(spec.origin))
    assert needed and needed <= known()


def test_the_cuda_library_needs_no_torch_after_2_11(cuda_build: tuple[Path, str]) -> None:
    needed = shims(cuda_build[0])
    assert "aoti_torch_get_current_cuda_stream" in needed
    assert needed <= known()


def test_no_kernel_spills_or_takes_more_registers_than_stated(cuda_build: tuple[Path, str]) -> None:
    kernels = ENTRY.findall(cuda_build[1])
    assert {file for file in REGISTERS if any(f"_{file}_cu_" in name for name, *_ in kernels)} == set(REGISTERS)
    for name, _, stores, loads, registers in kernels:
        file = next(file for file in REGISTERS if f"_{file}_cu_" in name)
        assert (stores, loads) == ("0", "0"), f"{name} spills"
        assert int(registers) <= REGISTERS[file], f"{name} takes {registers} registers"


def test_the_cuda_library_loads_and_registers_without_a_gpu(cuda_build: tuple[Path, str]) -> None:
    program = f"""
import ctypes, torch
from sparseserve.ops.library import SCHEMAS
ctypes.CDLL({str(cuda_build[0])!r})
for name in SCHEMAS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sparseserve::" + name, "CUDA"), name
"""
    subprocess.run([sys.executable, "-c", program], check=True)
