"""Which heads retrieve, by two detectors: needles that are copied, and random tokens that come again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, starmap
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor

from sparseserve.artifacts import Artifact
from sparseserve.calibration.chunks import Chunks, Tensors
from sparseserve.calibration.retrieval.copying import MAJORITY, copied, trace
from sparseserve.calibration.retrieval.induction import REPEATS, induction
from sparseserve.calibration.samples import needle, repeats
from sparseserve.calibration.subject import Subject
from sparseserve.errors import CalibrationError, Problem

Method = Literal["copy", "induction"]
THRESHOLD = 0.1  # a tenth of the tokens copied, as in Retrieval_Head, section 2
ANSWER_TOKENS = 64  # room for the answer in the model's context


@dataclass(frozen=True, slots=True)
class Question:
    """What a needle is drawn by."""

    length: int  # tokens
    depth: float
    seed: int

    def __str__(self) -> str:
        return f"{self.length}-{self.depth}-{self.seed}"


@dataclass(frozen=True, slots=True)
class HeadScores:
    """What both detectors measured; all scores from 0 to 1."""

    copied: Tensor | None  # [L, Hq] fp64: `copying.copied` with a majority of the mass, mean; None if none was right
    top: Tensor | None  # [L, Hq] fp64, the published score
    mass: Tensor  # [2, L, Hq] fp64: the published induction and echo scores
    share: Tensor  # [2, L, Hq] fp64: of rows with the majority of the mass
    asked: Counter[int]  # needles of each length
    right: Counter[int]  # those that were answered right

    def of(self, method: Method) -> Tensor:
        """The scores of a method [L, Hq]; an induction head or an echo head will do."""
        if method == "induction":
            return self.share.amax(0)
        if self.copied is None:
            allowed = "at least one right answer: a head that copies is one whose copy is the answer"
            remedy = "give smaller --lengths, or a model tuned to answer; --method induction needs no answers"
            lengths = ", ".join(map(str, self.asked))
            raise CalibrationError(Problem("right answers", f"0 at {lengths} tokens", allowed, remedy=remedy))
        return self.copied


def measure(
    subject: Subject,
    chunks: Chunks,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    text: Path | None = None,
) -> HeadScores:
    """Ask `samples` needles of every length and depth, and pass over repeated tokens of the largest length.

    CalibrationError if a length does not fit the model or holds no needle.
    """
    subject.check_length("--lengths", max(lengths) + ANSWER_TOKENS)
    seeds = range(seed, seed + samples)
    questions = {str(question): question for question in starmap(Question, product(lengths, depths, seeds))}

    def answer(name: str) -> Tensors:
        question = questions[name]
        prompt = needle(subject, question.length, question.depth, question.seed, file=text)
        looked = trace(subject, prompt)
        scores = {"copied": copied(looked, prompt, MAJORITY), "top": copied(looked, prompt)}
        return scores | {"right": torch.tensor(looked.right)}

    def passes(name: str) -> Tensors:
        begin = len(subject.tokenizer("").input_ids)
        return induction(subject, repeats(subject, int(name), REPEATS, seed, text), begin)

    answers = list(chunks.run("needles", list(questions), answer))
    (passed,) = chunks.run("repeats", [str(max(lengths))], passes)
    right = [answer for answer in answers if answer["right"]]
    return HeadScores(
        copied=_mean(right, "copied"),
        top=_mean(right, "top"),
        mass=passed["mass"],
        share=passed["share"],
        asked=Counter(question.length for question in questions.values()),
        right=Counter(q.length for q, a in zip(questions.values(), answers, strict=True) if a["right"]),
    )


def _mean(answers: Sequence[Tensors], key: str) -> Tensor | None:
    return torch.stack([answer[key] for answer in answers]).mean(0) if answers else None


def per_kv_head(scores: Tensor, kv_heads: int) -> Tensor:
    """[L, Hq] -> [L, H], the largest of each group."""
    return scores.view(len(scores), kv_heads, -1).amax(2)


def artifact(scores: HeadScores, subject: Subject, method: Method) -> Artifact:
    """The head map of one method, with the rule that a score of `THRESHOLD` makes a retrieval head.

    CalibrationError if no head reaches it.
    """
    chosen, shape = scores.of(method), subject.shape
    if chosen.max() < THRESHOLD:
        allowed = f"a head that reaches {THRESHOLD}"
        remedy = "the model retrieves nothing at these --lengths: check its answers at smaller ones"
        raise CalibrationError(Problem("largest score", f"{float(chosen.max()):.3f}", allowed, remedy=remedy))
    if method == "induction":  # Razor's unit is the KV head
        chosen = per_kv_head(chosen, shape.heads.kv_heads)
    what = {
        "copy": f"copy scores of {sum(scores.right.values())} answers",
        "induction": "induction and echo scores of one pass",
    }
    return Artifact(
        kind="retrieval",
        tensors={"scores": chosen},
        arguments={
            "scores": "sparseserve",
            "per": "query_head" if method == "copy" else "kv_head",
            "sink_tokens": None,
            "recent_tokens": None,
            "rule": {"threshold": THRESHOLD},
        },
        layers=shape.layers,
        heads=chosen.shape[1],
        source=f"{what[method]}, {shape.layers} layers x {chosen.shape[1]} heads",
        kv_heads=shape.heads.kv_heads,
        head_dim=shape.heads.head_dim,
        model=shape.name,
        config_sha256=shape.config_sha256,
    )


def columns(scores: HeadScores, kv_heads: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Score name -> ours and the published one [L, H] of KV heads."""
    named = {"copy": (scores.copied, scores.top)}
    named |= {name: (scores.share[index], scores.mass[index]) for index, name in enumerate(("induction", "echo"))}
    return {
        name: (per_kv_head(ours, kv_heads), per_kv_head(published, kv_heads))
        for name, (ours, published) in named.items()
        if ours is not None and published is not None
    }


def results(scores: HeadScores, kv_heads: int) -> dict[str, Any]:
    """All that was measured, for the report: scores per query head, heads as [layer, KV head]."""
    methods: list[Method] = ["copy", "induction"] if scores.copied is not None else ["induction"]
    found = {method: retrieval_heads(scores, method, kv_heads) for method in methods}
    return {
        "threshold": THRESHOLD,
        "questions": [{"length": n, "asked": scores.asked[n], "right": scores.right[n]} for n in scores.asked],
        "copy_score": _plain(scores.copied),
        "copy_score_as_published": _plain(scores.top),
        "induction_score": scores.share[0].tolist(),
        "echo_score": scores.share[1].tolist(),
        "induction_score_as_published": scores.mass[0].tolist(),
        "echo_score_as_published": scores.mass[1].tolist(),
        "retrieval_heads": {method: [list(head) for head in heads] for method, heads in found.items()},
        "agreement": _agreement(scores, kv_heads) if scores.copied is not None else None,
    }


def retrieval_heads(scores: HeadScores, method: Method, kv_heads: int) -> list[tuple[int, int]]:
    """(layer, KV head) of the heads that reach the threshold."""
    reached = per_kv_head(scores.of(method), kv_heads) >= THRESHOLD
    return [(layer, head) for layer, head in reached.nonzero().tolist()]


def _agreement(scores: HeadScores, kv_heads: int) -> dict[str, float | None]:
    """Spearman's rank correlation over all KV heads, and heads that both chose / heads that either chose."""
    copy, repeat = (per_kv_head(scores.of(method), kv_heads).flatten() for method in ("copy", "induction"))
    ranked = copy.min() < copy.max() and repeat.min() < repeat.max()
    one, other = copy >= THRESHOLD, repeat >= THRESHOLD
    either = int((one | other).sum())
    return {
        "rank_correlation": float(spearmanr(copy, repeat).statistic) if ranked else None,
        "overlap": int((one & other).sum()) / either if either else None,
    }


def _plain(scores: Tensor | None) -> list[list[float]] | None:
    return None if scores is None else scores.tolist()
