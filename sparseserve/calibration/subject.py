"""The model that is calibrated: loaded by transformers, attending through `attention`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from sparseserve.artifacts import read_model
from sparseserve.calibration.attention import IMPLEMENTATION, Attention, Hook, hooked
from sparseserve.errors import CalibrationError, Problem, UnsupportedError
from sparseserve.model import ModelShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Subject:
    """A causal language model with its tokenizer, in evaluation mode and without gradients of its weights."""

    model: Any  # transformers' PreTrainedModel
    tokenizer: Any
    shape: ModelShape  # the attention heads, on one rank; `name` is what the user gave

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on, as far as they depend on the model; JSON-able."""
        return {"model": self.shape.name, "config": self.shape.config_sha256, "dtype": str(self.model.dtype)}

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """Token ids as a batch of one sequence [1, T]."""
        return torch.tensor([ids], device=self.device)

    def check_length(self, key: str, tokens: int) -> None:
        """Raise CalibrationError unless the model takes so many tokens."""
        most = self.shape.max_len
        if most and tokens > most:
            allowed = f"at most {most} tokens, the context of {self.shape.name}"
            raise CalibrationError(Problem(key, tokens, allowed, remedy="give a smaller length"))


def load(name: str, device: str | None = None, dtype: str | None = None) -> Subject:
    """Load a model by folder or hub name; by default on CUDA as stored where there is one, else on the CPU as fp32.

    CalibrationError if it cannot be loaded, UnsupportedError if it attends otherwise than the policies serve.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind: Any = DTYPES[dtype] if dtype else torch.float32 if device == "cpu" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind, attn_implementation=IMPLEMENTATION)
        shape = read_model(Path(str(cached_file(name, "config.json"))))
        model = model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        allowed = "a folder or a name that transformers loads as a causal language model with its tokenizer"
        remedy = f"check the path ({str(error).strip().splitlines()[0]})"
        raise CalibrationError(Problem("model", name, allowed, remedy=remedy)) from None
    if not tokenizer.is_fast:
        remedy = "convert it to tokenizer.json"
        raise UnsupportedError(Problem("tokenizer", type(tokenizer).__name__, "a fast tokenizer", remedy=remedy))
    subject = Subject(model, tokenizer, replace(shape, name=name))
    _probe(subject)
    return subject


@torch.no_grad()
def prefill(subject: Subject, ids: Sequence[int], rows: int = 1) -> Any:
    """The model's cache of `ids` without the last `rows`; dense, as served. More than `rows` tokens."""
    return subject.model(subject.tensor(ids[:-rows]), use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def decode(
    subject: Subject,
    ids: Sequence[int],
    most: int,
    hook: Hook | None = None,
    cache: Any | None = None,
    rows: int = 1,
    until: str = "",
) -> list[int]:
    """The greedy continuation of `ids`, at most `most` tokens, without the end token; ends where its text has `until`.

    `hook` sees the last `rows` tokens of `ids` in one pass, then the decode steps; what is before is prefilled densely,
    or in `cache`, which grows.
    """
    ends, answer = _end_tokens(subject), list[int]()
    if cache is None and len(ids) > rows:
        cache = prefill(subject, ids, rows)
    newest = list(ids[-rows:])
    with hooked(hook) if hook else nullcontext():
        while len(answer) < most and not (until and until in subject.tokenizer.decode(answer)):
            out = subject.model(subject.tensor(newest), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, newest = out.past_key_values, [int(out.logits[0, -1].argmax())]
            if newest[0] in ends:
                break
            answer += newest
    return answer


def _end_tokens(subject: Subject) -> set[int]:
    ends = subject.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _probe(subject: Subject) -> None:
    """Run two tokens: every layer must come by `attention`, with the heads that config.json declares."""
    seen: dict[int, tuple[int, int, int, int]] = {}

    def look(attention: Attention) -> None:
        heads, kv_heads = attention.query.shape[0], attention.key.shape[0]
        seen[attention.layer] = (heads, kv_heads, attention.key.shape[2], attention.value.shape[2])

    with torch.no_grad(), hooked(look):
        subject.model(subject.tensor([0, 0]))
    heads = subject.shape.heads
    expected = (heads.query_heads, heads.kv_heads, heads.head_dim, heads.head_dim)
    if list(seen) != list(range(subject.shape.layers)) or set(seen.values()) != {expected}:
        found = f"layers {sorted(seen)} with (query heads, KV heads, key dim, value dim) {sorted(set(seen.values()))}"
        allowed = f"{subject.shape.layers} layers of {expected}, as its config.json declares"
        remedy = "take a decoder with full GQA or MHA attention in every layer"
        raise UnsupportedError(Problem("attention", found, allowed, remedy=remedy))
