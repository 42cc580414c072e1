"""A server as the evaluation sees it: exact prompts, timed answers, forced continuations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openai import BadRequestError, OpenAI

from sparseserve.errors import SparseServeError
from sparseserve.evaluation.exact import fit
from sparseserve.questions.needles import prose
from sparseserve.questions.tasks import Draft
from sparseserve.server.launch.process import Server

TIMEOUT = 3600.0  # seconds without a byte; a long prompt takes its time on a CPU
SOME_TEXT = 4096  # characters
FORCED = "forced_tokens"  # what plugin/forcing.py reads


@dataclass(frozen=True, slots=True)
class Completion:
    """A streamed answer."""

    text: str
    seconds: float  # from the first token to the last
    steps: int  # between them


class Client:
    """Speaks to the server's OpenAI API; models with a chat template are asked by chat."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._api = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT)
        card: Any = self._api.models.list().data[0]
        self._model = card.id
        self.max_tokens: int = card.max_model_len
        self._chats = self._has_chat_template()
        self._spaces = self.tokens("is 7")[:-1] == self.tokens("is ")  # whether a space is a token of its own
        self._size = self._token_size()

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, with or without those that begin a prompt."""
        ids: list[int] = self._tokenize(prompt=text, add_special_tokens=special)["tokens"]
        return ids

    def fit(self, draft: Draft, length: int) -> str:
        """The prompt of exactly `length` tokens, chat template included; ConfigError if it cannot be so short.

        Where the first token of an answer begins with a space, the question does not end with one.
        """
        draft = draft if self._spaces else replace(draft, question=draft.question.rstrip(" "))
        return fit(draft, length, self._count, self._size)

    def ask(self, prompt: str, length: int, max_tokens: int) -> Completion:
        """Greedy answer to a prompt of `length` tokens."""
        text, times, tokens = "", list[float](), 0
        for chunk in self._stream(prompt, max_tokens):
            if chunk.usage is not None and chunk.usage.prompt_tokens != length:
                raise SparseServeError(f"the server counts {chunk.usage.prompt_tokens} tokens in a prompt of {length}")
            for choice in chunk.choices:
                text += (choice.delta.content if self._chats else choice.text) or ""
                times.append(time.perf_counter())
                tokens += len(getattr(choice, "token_ids", None) or ())
        return Completion(text, times[-1] - times[0], tokens - 1)

    def force(self, prompt: Sequence[int], forced: Sequence[int]) -> list[float]:
        """Natural log-probabilities of the tokens `forced`, each given all before it; the prompt decides the first."""
        response: Any = self._api.completions.create(
            model=self._model,
            prompt=list(prompt),
            max_tokens=len(forced),
            temperature=0,
            logprobs=0,
            extra_body={"vllm_xargs": {FORCED: list(forced)}, "return_token_ids": True, "ignore_eos": True},
        )
        (choice,) = response.choices
        if choice.token_ids != list(forced):
            needs = "vLLM's model runner V1 and no --logits-processors of yours"
            raise SparseServeError(f"the server did not say the tokens of --text, which needs {needs}")
        logprobs: list[float] = choice.logprobs.token_logprobs
        return logprobs

    def _stream(self, prompt: str, max_tokens: int) -> Any:
        create: Callable[..., Any] = self._api.chat.completions.create if self._chats else self._api.completions.create
        return create(
            model=self._model,
            **({"messages": _message(prompt)} if self._chats else {"prompt": prompt}),
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )

    def _count(self, prompt: str) -> int:
        body = {"messages": _message(prompt)} if self._chats else {"prompt": prompt}
        count: int = self._tokenize(**body)["count"]
        return count

    def _token_size(self) -> float:
        """Characters of a token in some text; what earlier prompts tell would give a resumed run other prompts."""
        text = prose(SOME_TEXT, 0)
        return len(text) / len(self.tokens(text))

    def _has_chat_template(self) -> bool:
        try:
            self._tokenize(messages=_message("?"))
        except BadRequestError:
            return False
        return True

    def _tokenize(self, **body: Any) -> Any:
        url = f"{self.server.url}/tokenize"
        return self._api.post(url, cast_to=object, body={"model": self._model, **body})


def _message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
