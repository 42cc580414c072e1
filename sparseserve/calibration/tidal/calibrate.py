"""Where a model should choose its tokens again, for the policy tidal: measured on answers to needles and on text."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sparseserve.calibration.attention import hooked
from sparseserve.calibration.chunks import Chunks, Tensors
from sparseserve.calibration.samples import Needle, answer, document, needle
from sparseserve.calibration.subject import Subject
from sparseserve.calibration.tidal.selection import Curves, Watch
from sparseserve.errors import CalibrationError, Problem
from sparseserve.policies import Tidal

ROWS = 16  # that are looked at in a text
ANSWER_TOKENS = 64  # room for the answer in the model's context


def measure(
    subject: Subject,
    chunks: Chunks,
    policy: Tidal,
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    text: Path | None = None,
) -> Curves:
    """Ask `samples` needles of every length, evenly deep, and look at rows of as many texts.

    Only needles that are answered right count. CalibrationError if none is, or a length does not fit.
    """
    _check_lengths(subject, policy, lengths)
    names = [f"{length}-{index}" for length in lengths for index in range(samples)]

    def look(name: str) -> Tensors:
        length, index = map(int, name.split("-"))
        asked = _asked(subject, policy, needle(subject, length, (index + 0.5) / samples, seed + index, file=text))
        return asked | _read(subject, policy, document(subject, length, seed + index, text))

    seen = list(chunks.run("samples", names, look))
    right = [sample for sample in seen if sample["right"]]
    if not right:
        allowed = "at least one right answer, to see where the model looks for a needle"
        remedy = "give smaller --lengths, or a model tuned to answer"
        found = f"0 of {len(seen)} at {', '.join(map(str, lengths))} tokens"
        raise CalibrationError(Problem("right answers", found, allowed, remedy=remedy))
    return Curves(_mean(seen, "text"), _mean(right, "needle"), _mean(right, "on_needle"), len(right), len(seen))


def check_layers(subject: Subject, select_layer: int, count: int) -> None:
    """Raise CalibrationError unless so many layers come after `select_layer`."""
    most = max(0, subject.shape.layers - select_layer - 1)
    if count > most:
        allowed = f"at most {most}, the layers of {subject.shape.name} behind --select-layer {select_layer}"
        raise CalibrationError(Problem("--layers", count, allowed, remedy="choose fewer, or a lower --select-layer"))


def _check_lengths(subject: Subject, policy: Tidal, lengths: Sequence[int]) -> None:
    subject.check_length("--lengths", max(lengths) + ANSWER_TOKENS)
    if min(lengths) <= policy.budget_tokens:
        allowed = f"more than {policy.budget_tokens} tokens, the budget, within which nothing is left out"
        remedy = "give larger ones, or a lower --budget"
        raise CalibrationError(Problem("--lengths", min(lengths), allowed, remedy=remedy))


def _watch(subject: Subject, policy: Tidal, **options: Any) -> Watch:
    heads = subject.shape.heads.selection_heads(policy.scope)
    return Watch(subject.shape.layers, heads, policy.budget_tokens, **options)


def _asked(subject: Subject, policy: Tidal, question: Needle) -> Tensors:
    """Rows of an answer: what is kept of the mass on the value's tokens."""
    watch = _watch(subject, policy, value=question.value)
    _, right = answer(subject, question, watch)
    needle, on_needle = watch.needle / watch.rows, watch.on_needle / watch.rows
    return {"needle": needle, "on_needle": on_needle, "right": torch.tensor(right)}


@torch.no_grad()
def _read(subject: Subject, policy: Tidal, ids: list[int]) -> Tensors:
    """Rows of a text: what is kept of all mass."""
    rows = torch.linspace(max(policy.budget_tokens, len(ids) // 2), len(ids) - 1, ROWS).long().tolist()
    watch = _watch(subject, policy, rows=rows)
    with hooked(watch):
        subject.model(subject.tensor(ids), use_cache=False, logits_to_keep=1)
    return {"text": watch.kept / watch.rows}


def _mean(samples: Sequence[Tensors], key: str) -> Tensor:
    return torch.stack([sample[key] for sample in samples]).mean(0)


def explain(curves: Curves, select_layer: int, layers: Sequence[int]) -> str:
    """Why these layers, in one sentence."""
    text, found = curves.kept(select_layer, layers)
    plain_text, plain_found = curves.kept(select_layer, ())
    looks = layers[0] + int(curves.on_needle[layers[0] :].argmax())
    chooser = max(layer for layer in layers if layer <= looks)
    held = "attends densely" if chooser == looks else _holds(curves, (chooser, select_layer), looks)
    return (
        f"Choosing again at {_layers(layers)}, the layers after {select_layer} keep {found:.1%} of the attention that "
        f"answers put on the needle and {text:.1%} of that of text, instead of {plain_found:.1%} and {plain_text:.1%} "
        f"by layer {select_layer} alone: from layer {layers[0]} on, layer {looks} looks at the needle most, and {held}."
    )


def _holds(curves: Curves, choosers: tuple[int, int], layer: int) -> str:
    found = [f"{float(curves.needle[c, layer] / curves.on_needle[layer]):.1%}" for c in choosers]
    return f"finds {found[0]} of it among the tokens of layer {choosers[0]}, {found[1]} among those of {choosers[1]}"


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def results(curves: Curves, select_layer: int, layers: Sequence[int]) -> dict[str, Any]:
    """All that was measured, for the report; lists of `kept` begin at the layer after the choosing one."""
    text, found = curves.kept(select_layer, layers)
    return {
        "reselect_layer": list(layers),
        "why": explain(curves, select_layer, layers),
        "text_kept": text,
        "needle_kept": found,
        "answered": {"right": curves.right, "asked": curves.asked},
        "heads_on_needle": curves.on_needle.tolist(),
        "candidates": [_candidate(curves, select_layer, layer) for layer in range(select_layer, len(curves.text))],
    }


def _candidate(curves: Curves, select_layer: int, layer: int) -> dict[str, Any]:
    """One layer: what all layers keep if it is the only one beside `select_layer`, and the curves behind it."""
    text, found = curves.kept(select_layer, () if layer == select_layer else (layer,))
    later = curves.text[layer, layer + 1 :]
    return {
        "layer": layer,
        "objective": (text + found) / 2,
        "text_kept": text,
        "needle_kept": found,
        "kept_at_later_layers": later.tolist(),
        "mean": float(later.mean()) if len(later) else None,
        "minimum": float(later.min()) if len(later) else None,
        "needle_kept_at_later_layers": curves.needle[layer, layer + 1 :].tolist(),
    }


def policy_file(name: str, policy: Tidal) -> str:
    """The YAML of a policy file for a model by its name, or by that of its folder."""
    pattern = escape(Path(name).name if Path(name).exists() else name)
    values = policy.model_dump(mode="json", exclude_defaults=True)
    if len(values["reselect_layer"]) == 1:
        (values["reselect_layer"],) = values["reselect_layer"]
    entry = {"policy": policy.name} | values
    return yaml.safe_dump({"models": {pattern: entry}}, sort_keys=False, default_flow_style=None)
