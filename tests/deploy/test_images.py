"""The Dockerfiles, which nothing here can build: what they say, and what hadolint says of them."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.helpers.paths import DEPLOY

ROOT = DEPLOY.parent
PINNED = re.compile(r"\S+@sha256:[0-9a-f]{64}")
MAKEFILE = (ROOT / "Makefile").read_text()
every_image = pytest.mark.parametrize(
    "path", [DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.cuda"], ids=lambda p: p.name
)


def instructions(path: Path, name: str) -> list[str]:
    """The arguments of every instruction of a name, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.removeprefix(f"{name} ").strip() for line in text.splitlines() if line.startswith(f"{name} ")]


@every_image
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    hadolint = ROOT / ".venv-checks" / "bin" / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint of deploy/checks.lock is not in .venv-checks: run make test")
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@every_image
def test_bases_are_pinned_or_must_be_given_by_digest(path: Path) -> None:
    head = path.read_text().split("\nFROM ")[0]
    defaults = dict(re.findall(r"^ARG (\w+)=?(.*)$", head, re.MULTILINE))
    bases = [re.fullmatch(r"\$\{(\w+)\}(?: AS \w+)?", line) for line in instructions(path, "FROM")]
    for name in {base[1] for base in bases if base}:
        assert PINNED.fullmatch(defaults[name]) or (
            not defaults[name] and f'case "${{{name}}}" in *@sha256:*)' in path.read_text()
        )
    assert all(bases) and len(bases) == 2


@every_image
def test_it_runs_without_root_or_shell_and_ends_in_order(path: Path) -> None:
    assert instructions(path, "USER") == ["10001:10001"]
    assert json.loads(instructions(path, "ENTRYPOINT")[0]) == ["sparseserve", "serve"]
    assert instructions(path, "STOPSIGNAL") == ["SIGTERM"]
    (check,) = instructions(path, "HEALTHCHECK")
    program, *_ = json.loads(check[check.index("[") :])
    assert program.startswith("python") and "/health" in check
    titles = re.findall(r"org\.opencontainers\.image\.(\w+)", " ".join(instructions(path, "LABEL")))
    assert {"title", "licenses", "version", "revision"} <= set(titles)


@every_image
def test_what_is_copied_is_sent_to_the_builder(path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in instructions(path, "COPY") if "--from" not in line for source in line.split()[:-1]]
    assert set(copied) <= set(kept)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    assert {*packages, "kernels", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert all(fnmatch.filter(tracked, source) or fnmatch.filter(tracked, f"{source}/*") for source in kept)


def test_the_cuda_image_builds_the_makefiles_wheel() -> None:
    path = DEPLOY / "Dockerfile.cuda"
    (wanted,) = re.findall(r"^ARCHITECTURES := (.*)$", MAKEFILE, re.MULTILINE)
    assert f'ARG ARCHITECTURES="{wanted}"' in path.read_text()
    (wheel,) = re.findall(r"^wheel:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert set(re.findall(r"-Ccmake\.define\.(\w+)", wheel)) == set(
        re.findall(r"-Ccmake\.define\.(\w+)", path.read_text())
    )


@pytest.mark.parametrize(("version", "installed"), [("", []), ("2.50.0", ["ray==2.50.0"])])
def test_the_cuda_image_has_ray_when_it_is_asked_for(version: str, installed: list[str], tmp_path: Path) -> None:
    """The step itself, with a pip that writes down what it is given."""
    (step,) = re.findall(r"&& (\{ .*RAY_VERSION.*; \}) ", (DEPLOY / "Dockerfile.cuda").read_text())
    calls = tmp_path / "calls"
    calls.touch()
    script = f'python3() {{ echo "$@" >> {calls}; }}; true && {step} && echo on'
    done = subprocess.run(["sh", "-c", script], env={"RAY_VERSION": version}, capture_output=True, text=True)
    assert done.stdout == "on\n"
    assert [line.split()[-1] for line in calls.read_text().splitlines()] == installed


def test_what_builds_the_wheel_is_locked() -> None:
    (names,) = re.findall(r"grep -E '\^\(([^)]*)\)=='", (DEPLOY / "Dockerfile.cuda").read_text())
    locked = {line.split("==")[0] for line in (DEPLOY / "cpu.lock").read_text().splitlines()}
    assert set(names.split("|")) <= locked
    assert {"torch", "scikit_build_core", "cmake", "ninja"} <= set(names.split("|"))


@every_image
def test_the_version_is_the_packages(path: Path) -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"VERSION={version}" in instructions(path, "ARG")
