"""`vllm bench serve` as our client: its command, its process, and the JSON that it writes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loadtest.scenario import Load, LoadTestError, Scenario
from loadtest.server import Server

PROGRAM = [sys.executable, "-m", "loadtest.vllm_bench"]


class BenchResult(BaseModel):
    """What we read of the JSON of `--save-result --save-detailed`; all lists are by request, in the order sent."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    duration: float  # seconds
    completed: int
    failed: int
    request_throughput: float  # a second
    request_goodput: float | None  # requests within the SLO, a second
    output_throughput: float  # tokens a second
    input_lens: list[int]  # tokens
    output_lens: list[int]
    ttfts: list[float]  # seconds
    itls: list[list[float]]  # seconds
    latencies: list[float]  # seconds, of the whole answer
    generated_texts: list[str]
    errors: list[str]  # empty where there is none


def read_result(path: Path) -> BenchResult:
    """A result file; LoadTestError where there is none, or what it holds is no detailed result."""
    try:
        content: Any = json.loads(path.read_text())
        return BenchResult.model_validate(content)
    except (OSError, ValueError) as error:
        raise LoadTestError(f"{path} is no result of vllm bench serve --save-detailed: {error}") from None


def arguments(
    scenario: Scenario, load: Load, server: Server, tokenizer: str, dataset: Path, requests: int, result: Path
) -> list[str]:
    """The arguments of `vllm bench serve` for one run."""
    goodput = [f"ttft:{scenario.slo.ttft:g}", f"tpot:{scenario.slo.tpot:g}"]
    words = ["--backend", "openai", "--endpoint", "/v1/completions", "--base-url", server.url]
    words += ["--model", tokenizer, "--served-model-name", server.model, "--temperature", "0"]
    words += ["--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", str(requests)]
    words += ["--custom-output-len", "-1", "--skip-chat-template", "--disable-shuffle", "--no-oversample"]
    words += ["--seed", str(scenario.seed), *load.flags, "--goodput", *goodput]
    words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99", "--disable-tqdm"]
    words += ["--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name]
    return [*words, "--ignore-eos"] if scenario.answers == "control" else words


def command_line(words: Sequence[str]) -> str:
    """The same run for a shell; `vllm bench serve` takes the same arguments."""
    return shlex.join(["python", *PROGRAM[1:], *words])


class BenchClient:
    """A process that imported vLLM once and runs `vllm bench serve` again and again."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def run(self, words: Sequence[str]) -> None:
        """One run, to its end; LoadTestError where it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(list(words)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("its process ended") from None
        answer = self._process.stdout.readline()
        if answer != "\n":
            raise self._error(answer.strip() or "its process ended")

    def _error(self, what: str) -> LoadTestError:
        return LoadTestError(f"vllm bench serve failed: {what}; see {self._log}")


@contextmanager
def bench_client(log: Path) -> Iterator[BenchClient]:
    """A client until the end of the block."""
    with log.open("w") as output:
        process = subprocess.Popen(PROGRAM, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True)
        try:
            yield BenchClient(process, log)
        finally:
            process.terminate()
            process.communicate()
