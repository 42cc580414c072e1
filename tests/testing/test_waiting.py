"""Waiting ends with what was waited for, or tells what is still the case."""

from pathlib import Path

import pytest

from sparseserve.testing.waiting import wait_until


def test_what_comes_true_is_returned() -> None:
    answers = iter([0, [], "", "here"])
    assert wait_until(lambda: next(answers)) == "here"


def test_what_does_not_come_is_told() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.1 s: 3 of 4 requests"):
        wait_until(lambda: False, lambda: "3 of 4 requests", timeout=0.1)


def test_an_expected_failure_means_not_yet_and_is_the_cause_in_the_end() -> None:
    failures = iter([OSError("refused"), ConnectionResetError("reset")])

    def connects() -> bool:
        for failure in failures:
            raise failure
        return True

    assert wait_until(connects, not_yet=(OSError,))
    with pytest.raises(AssertionError) as given_up:
        wait_until(Path("/no/such/file").read_text, timeout=0.1, not_yet=(OSError,))
    assert isinstance(given_up.value.__cause__, FileNotFoundError)


def test_any_other_failure_ends_the_waiting() -> None:
    with pytest.raises(ZeroDivisionError):
        wait_until(lambda: 1 / 0, not_yet=(OSError,))
