"""Prompts with the answers that the model itself gives under dense attention: what MoA measures its loss on."""

from __future__ import annotations

import random
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from sparseserve.calibration.attention import Hook, hooked
from sparseserve.calibration.samples import document, needle
from sparseserve.calibration.subject import Subject, decode, prefill
from sparseserve.errors import CalibrationError, Problem

NEEDLE_TOKENS, TEXT_TOKENS = 32, 64  # of an answer, at most
PLACES = 8  # in the text that are tried before a model counts as silent


@dataclass(frozen=True, slots=True)
class Draw:
    """Where the prompts come from."""

    samples: int  # of each kind, at each length
    seed: int
    text: Path | None

    @property
    def names(self) -> list[str]:
        """Of the prompts of one length."""
        return [f"{kind}-{index}" for index in range(self.samples) for kind in ("needle", "text")]


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and the model's greedy answer, whose decode steps read the prompt's last token and on."""

    prompt: list[int]
    answer: list[int]
    value: str  # what a right answer holds; "" for text
    cache: Any  # the model's, of the prompt without the last token


def answered(subject: Subject, draw: Draw, name: str, length: int, purpose: str) -> Answered:
    """The prompt `name` of `length` tokens, other for every purpose; CalibrationError for a model that says nothing.

    Needles lie at random depths, one in each of as many equal parts as there are samples.
    """
    kind, index = name.rsplit("-", 1)
    for place in range(PLACES):
        chance = random.Random(f"{draw.seed} {purpose} {length} {name} {place}")
        seed, depth = chance.randrange(1 << 30), (int(index) + chance.random()) / draw.samples
        if kind == "needle":
            question = needle(subject, length, depth, seed, file=draw.text)
            prompt, value, most = question.ids, question.answer, NEEDLE_TOKENS
        else:
            prompt, value, most = document(subject, length, seed, draw.text), "", TEXT_TOKENS
        cache = prefill(subject, prompt)
        if answer := decode(subject, prompt, most, cache=_fork(cache)):
            return Answered(prompt, answer, value, cache)
    allowed = "a model that goes on with at least a token"
    remedy = "give another --text, or check the model's chat template and end token"
    raise CalibrationError(Problem(f"answer to {name}", "nothing", allowed, remedy=remedy))


def logits(subject: Subject, sample: Answered, hook: Hook | None = None) -> Tensor:
    """Of the answer's tokens [A, vocabulary] fp64, in the steps that decode it; `hook` sees their attention."""
    rows = [sample.prompt[-1], *sample.answer[:-1]]
    with hooked(hook) if hook else nullcontext():
        out = subject.model(subject.tensor(rows), past_key_values=_fork(sample.cache), use_cache=True)
    scores: Tensor = out.logits[0].double()  # in fp32 a sure model's gradient is 0
    return scores


def loss(subject: Subject, sample: Answered, scores: Tensor) -> Tensor:
    """Cross entropy of the answer, mean over its tokens; fp64."""
    return cross_entropy(scores, subject.tensor(sample.answer)[0])


def is_right(subject: Subject, sample: Answered, scores: Tensor) -> bool:
    """Whether greedy decoding by steps with these scores says the value.

    It says what the model said under dense attention up to the first step whose best token is another.
    """
    agrees = (scores.argmax(-1) == subject.tensor(sample.answer)[0]).cumprod(0)
    return sample.value in subject.tokenizer.decode(sample.answer[: int(agrees.sum())])


def _fork(cache: Any) -> Any:
    """A cache that goes on from this one, which stays as it is: what a layer adds, it adds to a copy of its keys."""
    fork = copy(cache)
    fork.layers = [copy(layer) for layer in cache.layers]
    return fork
