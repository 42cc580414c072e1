"""Shell scripts, which linters of Python do not see; those in Dockerfiles are hadolint's."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="the Debian package shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "deploy").rglob("*.sh")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
