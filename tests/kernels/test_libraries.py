"""What the compiled libraries need of torch and of a GPU: old torches load them, and no kernel that spills is built."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.paths import KERNELS

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
# Its launch bounds leave it too few registers.
SPILLS = """
__global__ void __launch_bounds__(1024, 2) wide(const float* in, float* out) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = x[i] * x[63 - i];
}
"""


def configure(folder: Path, *options: str) -> str:
    """Prepare a build of the CUDA library in `folder`; returns cmake."""
    if NVCC is None:
        pytest.skip("nvcc is not here: the CUDA kernels were not compiled")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake is not None
    options = (f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={NVCC}", *options)
    subprocess.run([cmake, "-S", KERNELS, "-B", folder, "-DSPARSESERVE_CUDA=ON", *options], check=True)
    return cmake


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    subprocess.run([configure(folder), "--build", folder, "--target", "_C_cuda", "-j"], check=True)
    return folder / "cuda" / "_C_cuda.so"


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


def test_the_cuda_library_needs_no_torch_after_2_11(cuda_library: Path) -> None:
    needed = shims(cuda_library)
    assert "aoti_torch_get_current_cuda_stream" in needed
    assert needed <= known()


def test_a_kernel_that_spills_is_not_built(tmp_path: Path) -> None:
    kernel = tmp_path / "spills.h"
    kernel.write_text(SPILLS)
    configure(tmp_path / "build", f"-DCMAKE_CUDA_FLAGS=-include {kernel}", "-G", "Unix Makefiles")
    make = ["make", "-C", str(tmp_path / "build" / "cuda"), "select_units.cu.o"]
    build = subprocess.run(make, capture_output=True, text=True)
    assert build.returncode != 0
    assert "spilled to local memory in function '_Z4widePKfPf'" in build.stdout + build.stderr


def test_the_cuda_library_loads_and_registers_without_a_gpu(cuda_library: Path) -> None:
    program = f"""
import ctypes, torch
from sparseserve.ops.library import SCHEMAS
ctypes.CDLL({str(cuda_library)!r})
for name in SCHEMAS:  # torch has no public way to ask
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sparseserve::" + name, "CUDA"), name
"""
    subprocess.run([sys.executable, "-c", program], check=True)
