"""The cap on bodies, as the environment gives it."""

from __future__ import annotations

import pytest

from sparseserve.environment import PASSED_ON, REQUEST_BYTES, max_request_bytes
from sparseserve.errors import ConfigError


def test_the_cap_is_32_mib_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUEST_BYTES, raising=False)
    assert max_request_bytes() == 32 * 1024 * 1024


@pytest.mark.parametrize(("text", "cap"), [("1", 1), ("007", 7), ("1048576", 1048576), (str(2**40), 2**40)])
def test_the_cap_is_what_the_launcher_passes_on(monkeypatch: pytest.MonkeyPatch, text: str, cap: int) -> None:
    monkeypatch.setenv(REQUEST_BYTES, text)
    assert max_request_bytes() == cap and REQUEST_BYTES in PASSED_ON


@pytest.mark.parametrize("text", ["", " ", "000", " 5", "+5", "1.0", "1e6", "1_000", "\u00b2"])
def test_what_is_no_number_of_bytes_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(REQUEST_BYTES, text)
    with pytest.raises(ConfigError) as error:
        max_request_bytes()
    problem = error.value.problem
    assert (problem.key, problem.value) == ("SPARSESERVE_MAX_REQUEST_BYTES", text)
    assert (problem.allowed, problem.remedy) == ("a whole number of bytes from 1", "unset it for 32 MiB")
