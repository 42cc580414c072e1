"""The demo: the same long-document questions under four policies, side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from sparseserve.demo.build import build
from sparseserve.demo.circuits import RESELECT_LAYER
from sparseserve.policies import POLICIES
from sparseserve.questions.needles import Question, ask
from sparseserve.server.launch.process import SERVE, Server, running

DOCUMENT_TOKENS = 8192
DEPTHS = (0.1, 0.5, 0.9)
SERVED: dict[str, list[str]] = {
    "dense": [],
    "tidal": ["--set", f"reselect_layer={RESELECT_LAYER}"],
    "quest": [],
    "streaming": [],
}
VLLM_FLAGS = ["--max-model-len", "9216", "--max-num-seqs", "4", "--enforce-eager", "--disable-uvicorn-access-log"]


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """One streamed answer."""

    right: bool
    first_token: float  # seconds
    per_token: float | None  # seconds, after the first; None where there is one only


@dataclass(frozen=True, slots=True)
class Result:
    """What one policy did."""

    answers: list[TimedAnswer]
    share: float  # of the resident KV tokens that decode steps attended to

    @property
    def right(self) -> int:
        """Right answers."""
        return sum(answer.right for answer in self.answers)


def run() -> int:
    """Ask, print the table; 0 when every policy did what it should."""
    console = Console()
    questions = [ask(DOCUMENT_TOKENS, depth, seed=0) for depth in DEPTHS]
    with TemporaryDirectory() as folder:
        model = Path(folder) / "demo-model"
        build(model)
        console.print(
            f"Demo model written. {len(questions)} questions on {DOCUMENT_TOKENS} tokens of real text, such as"
        )
        console.print(f"  ...{questions[0].prompt[-40:]!r} -> {questions[0].answer!r}")
        results = {}
        for policy, flags in SERVED.items():
            console.print(f"serving under {policy} ...")
            results[policy] = _serve(model, policy, flags, questions)
    console.print(_table(results))
    as_expected = [
        (result.right == len(DEPTHS)) == POLICIES[name].finds_single_tokens for name, result in results.items()
    ]
    return 0 if all(as_expected) else 1


def _serve(model: Path, policy: str, flags: Sequence[str], questions: list[Question]) -> Result:
    command = [*SERVE, str(model), "--policy", policy, *flags, *VLLM_FLAGS, "--served-model-name", "demo"]
    with running(command, log=model.parent / f"{policy}.log", env={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answers = [_ask(client, question) for question in questions]
        return Result(answers, _share(server))


def _ask(client: OpenAI, question: Question) -> TimedAnswer:
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question.prompt}], temperature=0, max_tokens=16, stream=True
    )
    text, times = "", []
    for chunk in stream:
        if piece := chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            text += piece
    per_token = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    return TimedAnswer(text == question.answer, times[0] - start, per_token)


def _share(server: Server) -> float:
    attended = server.total("sparseserve_kv_tokens_attended_total")
    return attended / server.total("sparseserve_kv_tokens_resident_total")


def _table(results: dict[str, Result]) -> Table:
    table = Table("policy", "right", *(f"needle at {depth:.0%}" for depth in DEPTHS))
    for title in ("first token, s", "ms per token", "share of KV read"):
        table.add_column(title, justify="right")
    table.columns[0].no_wrap = True
    for policy, result in results.items():
        per_token = [answer.per_token for answer in result.answers if answer.per_token is not None]
        table.add_row(
            policy,
            f"{result.right} of {len(result.answers)}",
            *("found" if answer.right else "lost" for answer in result.answers),
            f"{median(answer.first_token for answer in result.answers):.2f}",
            f"{1000 * median(per_token):.1f}" if per_token else "-",
            f"{result.share:.1%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(run())
