"""pytest plugin: where CI is set, a test that is skipped for any reason but the written ones fails."""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

# Pattern of a reason -> why CI does without. All other tools that tests look for must be there.
ALLOWED = {
    r"this machine lacks \w+": "instruction sets are the CPU's to have",
    r"SPARSESERVE_PUBLISHED names no folder .*": "files that authors published are not part of the project",
    r"pip install 'lm_eval\[api\]'.*": "its 35 packages are not in deploy/cpu.lock",
}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skips."""
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips."""
    report = yield
    _judge(report)
    return report


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)  # path, line, message
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not any(re.fullmatch(pattern, reason) for pattern in ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped where CI is set, which tests/helpers/skips.py does not allow: {reason}"
