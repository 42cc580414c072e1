"""What is asked of a running server, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sparseserve.errors import ConfigError
from sparseserve.evaluation.client import Client, Completion
from sparseserve.evaluation.evaluation import Evaluation
from sparseserve.evaluation.perplexity import FORCED_CHARACTERS, bits
from sparseserve.evaluation.pieces import Piece, cells
from sparseserve.questions.tasks import Draft, draft
from sparseserve.server.launch.process import Server

ATTENDED, RESIDENT = (f"sparseserve_kv_tokens_{kind}_total" for kind in ("attended", "resident"))
RECALL = {f"sparseserve_layer_recall_{part}": part for part in ("sum", "count")}


@dataclass(frozen=True, slots=True)
class Examiner:
    """Asks the questions of a request; `prompts` outlive a server, for all settings are asked the same."""

    request: Evaluation
    prompts: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def check(self, client: Client) -> None:
        """Raise ConfigError for a length that leaves no room to answer, before any is measured."""
        request = self.request
        for length in request.lengths:
            drafts = (
                draft(task, length, depth, sample, request.seed)
                for task, depth in cells(request)
                for sample in range(request.samples)
            )
            answer = max(question.answer_tokens for question in drafts)
            _check_room(client, length, answer if request.text is None else max(answer, FORCED_CHARACTERS))

    def measure(self, client: Client, piece: Piece) -> dict[str, Any]:
        """The finding of a piece, JSON-able; its keys are those that `assemble` reads."""
        match piece.kind:
            case "cell":
                return self._cell(client, piece)
            case "recall":
                return self._recall(client, piece)
            case "text":
                return self._text(client, piece)

    def _cell(self, client: Client, piece: Piece) -> dict[str, Any]:
        before = _tokens(client.server)
        answers = [
            self._ask(client, piece.length, piece.task, piece.depth, sample) for sample in range(self.request.samples)
        ]
        attended, resident = (now - then for now, then in zip(_tokens(client.server), before, strict=True))
        return {
            "scores": [score for score, _ in answers],
            "times": [(answer.seconds, answer.steps) for _, answer in answers if answer.steps],
            "attended": attended,
            "resident": resident,
        }

    def _recall(self, client: Client, piece: Piece) -> dict[str, Any]:
        """Of the first question of every task."""
        before = _recall(client.server)
        for task, depths in groupby(cells(self.request), key=lambda cell: cell[0]):
            self._ask(client, piece.length, task, next(depths)[1], 0)
        after = _recall(client.server)
        rows = [after["count", layer] - before.get(("count", layer), 0) for layer in range(len(after) // 2)]
        kept = [after["sum", layer] - before.get(("sum", layer), 0) for layer in range(len(rows))]
        return {"recall": [mass / count for mass, count in zip(kept, rows, strict=True)] if any(rows) else None}

    def _text(self, client: Client, piece: Piece) -> dict[str, Any]:
        text = self.request.read_text()
        assert text is not None
        total, counted = bits(client, text, piece.length, self.request.samples)
        return {"bits": total, "bytes": counted}

    def _ask(
        self, client: Client, length: int, task: str, depth: float | None, sample: int
    ) -> tuple[float, Completion]:
        """An answer and its score."""
        question = draft(task, length, depth, sample, self.request.seed)
        prompt = self._prompt(client, question, (length, task, depth, sample))
        answer = client.ask(prompt, length, question.answer_tokens)
        return question.score(answer.text), answer

    def _prompt(self, client: Client, question: Draft, key: tuple[Any, ...]) -> str:
        if key not in self.prompts:
            self.prompts[key] = client.fit(question, key[0])
        return self.prompts[key]


def _check_room(client: Client, length: int, answer: int) -> None:
    if length + answer > client.max_tokens:
        allowed = f"at most {client.max_tokens - answer}: the context of {client.max_tokens} less {answer} to answer"
        raise ConfigError("--lengths", length, allowed, remedy="give --max-model-len, or shorter lengths")


def _tokens(server: Server) -> tuple[float, float]:
    """KV tokens attended to and resident, so far."""
    return server.total(ATTENDED), server.total(RESIDENT)


def _recall(server: Server) -> dict[tuple[str, int], float]:
    """Sum and count of every layer, so far."""
    found = (sample for sample in server.samples() if sample.name in RECALL)
    return {(RECALL[sample.name], int(sample.labels["layer"])): sample.value for sample in found}
