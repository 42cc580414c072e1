"""Whether what came back is what should have: every completion there, whole, and right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.bench import BenchResult
from loadtest.prompts import Prompt
from loadtest.scenario import Scenario

CONTROL_MUST_KNOW = 0.5  # share: a control that answers less says nothing about the others


@dataclass(frozen=True, slots=True)
class Checked:
    """The requests of one or more runs."""

    sent: int
    whole: int  # completions without an error and with the tokens that they should have
    right: int | None  # None where no answer is known
    first_error: str  # empty where none failed

    def __add__(self, other: Checked) -> Checked:
        right = None if self.right is None or other.right is None else self.right + other.right
        first = self.first_error or other.first_error
        return Checked(self.sent + other.sent, self.whole + other.whole, right, first)

    @property
    def share(self) -> float | None:
        """Of the requests that were sent."""
        return None if self.right is None else self.right / self.sent


def check(scenario: Scenario, made: Sequence[Prompt], result: BenchResult) -> Checked:
    """Check a run; a request that the file says nothing of counts as sent and not as whole."""
    known = scenario.answers == "needle"
    least = 1 if known else scenario.output_tokens
    answered = zip(made, result.output_lens, result.generated_texts, result.errors, strict=False)
    marks = [
        (not error and length >= least, not error and known and prompt.answer is not None and prompt.answer in text)
        for prompt, length, text, error in answered
    ]
    errors = (error.strip().splitlines()[-1] for error in result.errors if error.strip())
    right = sum(mark for _, mark in marks) if known else None
    return Checked(len(made), sum(whole for whole, _ in marks), right, next(errors, ""))


def problems(scenario: Scenario, checked: Checked, control: Checked) -> list[str]:
    """What is wrong with a setting, by its own requests and by the control's answers."""
    found = []
    if missing := checked.sent - checked.whole:
        why = f": {checked.first_error}" if checked.first_error else ""
        found.append(f"{missing} of {checked.sent} requests failed, or came back empty or short{why}")
    if checked.share is None or control.share is None:
        return found
    if control.share < CONTROL_MUST_KNOW:
        found.append(f"the control answered {control.right} of {control.sent}: with this model answers tell nothing")
    elif checked.share < (least := scenario.share_right * control.share):
        found.append(
            f"answered {checked.right} of {checked.sent} right ({checked.share:.0%}); expected at least {least:.0%}, "
            f"that is {scenario.share_right:.0%} of the control's {control.share:.0%}"
        )
    return found
