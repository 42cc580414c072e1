"""What `sparseserve doctor` looks at."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sparseserve.cli.doctor.lookup import names
from sparseserve.cli.doctor.seams import seams
from sparseserve.errors import SparseServeError
from sparseserve.vllm_version import VLLM_VERSION

INSTALL = "pip install 'sparseserve[cpu]'"
ENDPOINT_PLUGINS = ["sparseserve_front", "sparseserve_metrics", "sparseserve_routes"]
ENTRY_POINTS = {"vllm.general_plugins": ["sparseserve"], "vllm.endpoint_plugins": ENDPOINT_PLUGINS}

Status = Literal["ok", "warning", "blocks"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    status: Status
    found: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Everything that serving needs, in the order in which it is needed."""
    findings = [_python(), _torch(), _kernels(), _gpu(), _vllm()]
    if findings[-1].status != "blocks":
        findings += [_seams(), _console_script(), _allocator()]
    return [*findings, _plugins(), *_companions()]


def _finding(check: str, fine: bool, found: str, remedy: str, otherwise: Status = "blocks") -> Finding:
    return Finding(check, "ok" if fine else otherwise, found, "" if fine else remedy)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return _finding("Python", sys.version_info >= (3, 11), found, "use Python 3.11 or newer")


def _torch() -> Finding:
    import torch

    fine = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    return _finding("torch", fine, torch.__version__, "install torch 2.11 or newer")


def _kernels() -> Finding:
    from sparseserve import ops

    try:
        return Finding("kernels", "ok", f"built, {ops.isa()} in use")
    except SparseServeError as error:
        return Finding("kernels", "blocks", "not built", str(error))


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "ok", "none; policies run on the CPU")
    from sparseserve.ops.library import kernels

    try:
        kernels("cuda")
    except SparseServeError as error:
        return Finding("GPU", "warning", f"{torch.cuda.get_device_name()}, CUDA kernels not built", str(error))
    return Finding("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA kernels built")


def _vllm() -> Finding:
    if find_spec("vllm") is None:
        return Finding("vLLM", "blocks", "not installed", INSTALL)
    distributions = packages_distributions().get("vllm")
    if not distributions:
        return Finding("vLLM", "blocks", "not installed as a package, so of an unknown version", INSTALL)
    found = version(distributions[0])
    return _finding("vLLM", found.startswith(VLLM_VERSION), found, f"install vLLM {VLLM_VERSION}x: {INSTALL}")


def _seams() -> Finding:
    looked_up = [(name, there, seam.where) for seam in seams() for name, there in names(seam.module, seam.way)]
    missing: dict[str, list[str]] = {}
    for name, there, where in looked_up:
        if not there:
            missing.setdefault(name, []).append(where)
    gone = [f"{name} ({', '.join(where)})" for name, where in missing.items() if not _follows(name, missing)]
    found = f"missing {', '.join(gone)}" if gone else f"all there ({len({name for name, _, _ in looked_up})} names)"
    return _finding("vLLM seams", not gone, found, f"this vLLM has been changed: {INSTALL}")


def _follows(name: str, missing: Iterable[str]) -> bool:
    """Whether a name is missing because what it would be looked up on is."""
    return any(name.startswith((f"{other}.", f"{other}:", f"{other}(")) for other in missing)


def _console_script() -> Finding:
    try:
        distribution("vllm")
    except PackageNotFoundError:
        found = "`vllm` cannot start: it looks for a distribution named vllm"
        return Finding("vllm script", "warning", found, "start servers with `sparseserve serve`")
    return Finding("vllm script", "ok", "starts")


def _allocator() -> Finding:
    vllm = find_spec("vllm")
    folders = [] if vllm is None else vllm.submodule_search_locations or []
    bundled = [library for folder in folders for library in Path(folder).glob("libs/libtcmalloc*")]
    fine = bool(bundled) or "tcmalloc" in os.environ.get("LD_PRELOAD", "")
    found = "tcmalloc" if fine else "no tcmalloc: allocation on the CPU is slower"
    return _finding("allocator", fine, found, "install libtcmalloc-minimal4 and name it in LD_PRELOAD", "warning")


def _plugins() -> Finding:
    wanted = [(group, name) for group, names in ENTRY_POINTS.items() for name in names]
    missing = [name for group, name in wanted if name not in entry_points(group=group).names]
    found = ", ".join(name for _, name in wanted) if not missing else f"missing {', '.join(missing)}"
    return _finding("vLLM plugins", not missing, found, "install sparseserve: its folder on PYTHONPATH is not enough")


def _companions() -> Iterator[Finding]:
    """torchvision and torchaudio are optional, but vLLM dies on ones built for another torch."""
    for name in filter(find_spec, ("torchvision", "torchaudio")):
        try:
            import_module(name)
            yield Finding(name, "ok", version(name))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield Finding(name, "blocks", reason, f"pip uninstall {name}, or install the build for this torch")
