"""Whether what came back is what should have: every completion there, whole, and right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtest.bench import BenchResult
from loadtest.prompts import Prompt
from loadtest.scenario import Scenario

CONTROL_MUST_KNOW = 0.5  # share: a control that answers less says nothing about the others
RIGHT = {"needle": "right", "control": "like the control's"}


@dataclass(frozen=True, slots=True)
class Checked:
    """The requests of any number of runs."""

    sent: int = 0
    whole: int = 0  # completions without an error and with the tokens that they should have
    right: int | None = 0  # None where no answer is known
    first_error: str = ""  # empty where none failed

    def __add__(self, other: Checked) -> Checked:
        right = None if self.right is None or other.right is None else self.right + other.right
        first = self.first_error or other.first_error
        return Checked(self.sent + other.sent, self.whole + other.whole, right, first)

    @property
    def share(self) -> float | None:
        """Of the requests that were sent."""
        return None if self.right is None or not self.sent else self.right / self.sent


ByLoad = Mapping[str, Checked]


def check(scenario: Scenario, made: Sequence[Prompt], result: BenchResult, control: BenchResult | None) -> Checked:
    """Check a run; a request that the file says nothing of counts as sent and not as whole. `control` is what the
    control answered to the same prompts; None for the control itself, which nothing says to be right or wrong."""
    least = 1 if scenario.answers == "needle" else scenario.output_tokens
    answered = zip(result.output_lens, result.errors, strict=True)
    whole = [not error and length >= least for length, error in answered]
    right = _right(scenario, made, result, control)
    errors = (error.strip().splitlines()[-1] for error in result.errors if error.strip())
    return Checked(len(made), sum(whole), None if right is None else sum(right), next(errors, ""))


def problems(scenario: Scenario, checked: ByLoad, reference: ByLoad) -> list[str]:
    """What is wrong with a setting at any load. `reference` has the share of answers that can be right: the control's,
    or that of its second server, where answers are compared with the control's."""
    return [*_missing(checked), *_unknown(reference), *_wrong(scenario, checked, reference)]


def _right(
    scenario: Scenario, made: Sequence[Prompt], result: BenchResult, control: BenchResult | None
) -> list[bool] | None:
    if scenario.answers == "needle":
        answered = zip(made, result.generated_texts, result.errors, strict=False)
        return [not error and prompt.answer is not None and prompt.answer in text for prompt, text, error in answered]
    if control is None:
        return None
    first = slice(scenario.same_characters)
    both = zip(result.generated_texts, result.errors, control.generated_texts, control.errors, strict=False)
    return [not (error or other) and text[first] == wanted[first] for text, error, wanted, other in both]


def _missing(checked: ByLoad) -> Iterator[str]:
    short = {load: one for load, one in checked.items() if one.whole < one.sent}
    if short:
        counts = ", ".join(f"{one.sent - one.whole} of {one.sent} at {load}" for load, one in short.items())
        first = next((one.first_error for one in short.values() if one.first_error), "")
        yield f"requests failed, or came back empty or short: {counts}" + (
            f"; the first error: {first}" if first else ""
        )


def _unknown(reference: ByLoad) -> Iterator[str]:
    counts = ", ".join(f"{reference[load].right} of {reference[load].sent} at {load}" for load in _unknowing(reference))
    if counts:
        yield f"the control answered {counts}: with this model answers tell nothing there"


def _wrong(scenario: Scenario, checked: ByLoad, reference: ByLoad) -> Iterator[str]:
    wrong = list[str]()
    for load, one in checked.items():
        known = reference[load].share
        if one.share is None or known is None or load in _unknowing(reference):
            continue
        if one.share < (least := scenario.share_right * known):
            wrong.append(f"{one.right} of {one.sent} at {load} ({one.share:.1%}; expected at least {least:.1%})")
    if wrong:
        yield f"too few answers {RIGHT[scenario.answers]}, against the control: {', '.join(wrong)}"


def _unknowing(reference: ByLoad) -> list[str]:
    """The loads at which the control knows too little."""
    return [load for load, one in reference.items() if one.share is not None and one.share < CONTROL_MUST_KNOW]
