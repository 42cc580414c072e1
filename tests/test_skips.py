"""On a CI machine no test skips but for a reason that is written down."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="promtool (Debian package prometheus) is not installed")
def test_marked(): ...

@pytest.fixture
def simulator(): pytest.skip("the simulator was not built")
def test_of_a_fixture(simulator): ...

def test_inside(): pytest.importorskip("no_such_module")

@pytest.mark.xfail
def test_expected_to_fail(): assert False

def test_passes(): ...

@pytest.mark.parametrize("reason", {allowed})
def test_allowed(reason): pytest.skip(reason)
"""
REFUSED = {
    "test_marked": "promtool (Debian package prometheus) is not installed",
    "test_of_a_fixture": "the simulator was not built",
    "test_inside": "No module named 'no_such_module'",
}
ALLOWED = [
    "this machine lacks avx512_bf16",
    "SPARSESERVE_PUBLISHED names no folder with moa/ and duo/",
    "pip install 'lm_eval[api]'; its 35 packages are not in deploy/cpu.lock",
]


def run(file: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of the tests in a file."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.helpers.skips", "-rA", f"--rootdir={file.parent}"]
    env = {name: value for name, value in os.environ.items() if name != "CI"} | environment
    done = subprocess.run([*command, file], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test_some.py"
    path.write_text(TESTS.format(allowed=ALLOWED))
    return path


def test_ci_fails_on_a_skip_that_is_not_written_down(file: Path) -> None:
    code, output = run(file, CI="true")
    assert code == 1 and "1 failed, 1 passed, 3 skipped, 1 xfailed, 2 errors" in output, output
    for test, reason in REFUSED.items():
        assert re.search(rf"(FAILED|ERROR) \S+::{test} - .*{re.escape(reason)}", output)


def test_elsewhere_every_skip_is_fine(file: Path) -> None:
    code, output = run(file)
    assert code == 0 and "1 passed, 6 skipped, 1 xfailed" in output


def test_ci_fails_on_a_module_that_skips_itself(tmp_path: Path) -> None:
    path = tmp_path / "test_whole.py"
    path.write_text("import pytest\npytest.importorskip('no_such_module')\ndef test_nothing(): ...\n")
    code, output = run(path, CI="true")
    assert code == pytest.ExitCode.INTERRUPTED and "No module named 'no_such_module'" in output
    assert run(path)[0] == pytest.ExitCode.NO_TESTS_COLLECTED
