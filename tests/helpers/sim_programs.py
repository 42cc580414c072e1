"""The programs of kernels/, built with the simulator."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.helpers.paths import KERNELS, ROOT

PROGRAMS = ROOT / "tests" / "sim" / "kernels"
SIMULATOR = KERNELS / "sim"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-strict-aliasing"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
ORDERS = ["forward", "backward", "random"]

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def compile_programs(compiler: str, sources: list[Path], flags: list[str], folder: Path) -> dict[str, Path]:
    """One program per .cu file, with all .cpp files in each."""
    folder.mkdir()

    def command(*arguments: object) -> None:
        subprocess.run([compiler, *flags, *map(str, arguments)], check=True)

    def compile_one(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        command("-I", SIMULATOR, "-x", "c++", "-c", source, "-o", to)
        return to

    def link(kernels: Path) -> Path:
        command(kernels, *engine, "-pthread", "-o", kernels.with_suffix(""))
        return kernels.with_suffix("")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(sources, pool.map(compile_one, sources), strict=True))
        engine = [to for source, to in objects.items() if source.suffix == ".cpp"]
        kernels = [to for source, to in objects.items() if source.suffix == ".cu"]
        return {program.name: program for program in pool.map(link, kernels)}


def values_of(done: subprocess.CompletedProcess[bytes]) -> dict[str, list[float]]:
    """The printed lines, by their first word or by what stands before a colon."""
    assert done.returncode == 0, done.stderr.decode()
    lines = {}
    for line in done.stdout.decode().splitlines():
        name, _, values = line.partition(": " if ": " in line else " ")
        lines[name] = [float(value) for value in values.split()]
    return lines
