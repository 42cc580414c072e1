"""Two real servers, dense and quest: the numbers are those that transformers gives, and those of the policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.demo.build import build
from sparseserve.evaluation.client import Client
from sparseserve.evaluation.evaluation import Evaluation, Setting, settings
from sparseserve.evaluation.results import Results
from sparseserve.evaluation.run import FORCING, Serve, evaluate
from sparseserve.questions.needles import prose
from sparseserve.questions.tasks import TASKS, draft
from sparseserve.server.launch.process import SERVE, Server, running

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.e2e

LENGTH = 1500
FLAGS = ["--max-model-len", "2560", "--max-num-seqs", "4", "--enforce-eager"]
HARNESS = Path(__file__).parent / "harness"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "demo"
    build(path)
    return path


@pytest.fixture(scope="module")
def dense(model: Path) -> Iterator[Server]:
    yield from _serve(model, "--policy", "dense")


@pytest.fixture(scope="module")
def quest(model: Path) -> Iterator[Server]:
    yield from _serve(model, "--policy", "quest", "--set", "budget_tokens=768", "--set", "recall_sample=1")


def _serve(model: Path, *flags: str) -> Iterator[Server]:
    command, env = [*SERVE, str(model), *flags, *FLAGS, *FORCING], {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with running(command, model.parent / f"{flags[1]}.log", env) as server:
        yield server


def only(server: Server) -> Serve:
    """A server that is there already, whatever is asked for."""

    @contextmanager
    def serve(request: Evaluation, setting: Setting) -> Iterator[Server]:
        yield server

    return serve


@pytest.fixture(scope="module")
def peer(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose(3000, 9000))
    return path


@pytest.fixture(scope="module")
def results(model: Path, dense: Server, text: Path) -> Results:
    request = Evaluation(
        model=str(model),
        settings=settings("dense", []),
        lengths=(LENGTH,),
        depths=(0.3,),
        samples=1,
        text=str(text),
        recall=False,
    )
    return evaluate(request, serve=only(dense))


@pytest.mark.parametrize("task", TASKS)
def test_dense_answers_and_scores_as_transformers(
    model: Path, dense: Server, results: Results, peer: Any, task: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    question = draft(task, LENGTH, 0.3 if TASKS[task].placed else None, 0, seed=0)
    client = Client(dense)
    prompt = client.fit(question, LENGTH)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_dict=True, return_tensors="pt")
    assert chat["input_ids"].shape == (1, LENGTH)
    said = peer.generate(**chat, max_new_tokens=question.answer_tokens, do_sample=False)[0, LENGTH:]
    expected = tokenizer.decode(said, skip_special_tokens=True)
    assert client.ask(prompt, LENGTH, question.answer_tokens).text == expected
    (cell,) = (cell for cell in results.settings[0].cells if cell.task == task)
    assert cell.scores == [question.score(expected)]
    if task in ("needle", "multikey", "copy", "facts"):
        assert cell.score == 1


def test_forced_tokens_cost_what_transformers_says(dense: Server, peer: Any) -> None:
    ids = [256, *prose(1400, 100).encode()]
    ours = Client(dense).force(ids[:1200], ids[1200:])
    with torch.no_grad():
        logits = peer(torch.tensor([ids])).logits[0, 1199:-1].float()
    theirs = logits.log_softmax(-1)[torch.arange(len(logits)), ids[1200:]]
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0.02, atol=0.02)


def test_dense_bits_per_byte_are_those_of_transformers(results: Results, peer: Any, text: Path) -> None:
    """One stretch, behind 1.1 times as many bytes as tokens are asked for."""
    at = results.settings[0].lengths[0]
    start = 1650
    stretch = text.read_bytes()[start : start + 256]
    ids = [256, *text.read_bytes()[start - LENGTH + 1 : start], *stretch]
    with torch.no_grad():
        logits = peer(torch.tensor([ids])).logits[0, LENGTH - 1 : -1].float()
    nats = -logits.log_softmax(-1)[torch.arange(len(stretch)), list(stretch)].sum()
    assert at.scored_bytes == len(stretch)
    assert at.bits_per_byte == pytest.approx(float(nats) / len(stretch) / torch.log(torch.tensor(2)).item(), rel=0.01)


def test_dense_reads_everything(results: Results) -> None:
    at = results.settings[0].lengths[0]
    assert at.density == 1 and at.ms_per_token and at.timed_tokens > 100 and at.recall is None


def test_recall_and_density_of_a_sparse_policy(model: Path, quest: Server) -> None:
    """The first two layers of quest are dense; the others read 768 tokens of about 1500."""
    request = Evaluation(
        model=str(model),
        settings=settings("quest", [768]),
        lengths=(800, LENGTH),
        depths=(0.5,),
        samples=1,
        tasks=("needle", "copy"),
    )
    short, at = evaluate(request, serve=only(quest)).settings[0].lengths
    assert short.recall is None and short.density is None  # such rows take vLLM's own attention
    assert at.recall is not None and at.density is not None
    assert at.recall[:2] == [1, 1] and all(0.3 < share < 1 for share in at.recall[2:])
    assert 0.6 < at.density < 0.7


def test_the_harness_scores_local_data(model: Path, dense: Server, tmp_path: Path) -> None:
    """lm-evaluation-harness, with a task on local data; nothing is downloaded."""
    pytest.importorskip("lm_eval", reason="pip install 'lm_eval[api]'; its 35 packages are not in deploy/cpu.lock")
    settings = {
        "model": model,
        "base_url": f"{dense.url}/v1/completions",
        "tokenizer": model,
        "tokenized_requests": False,
    }
    arguments = ",".join(f"{key}={value}" for key, value in settings.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "pass_key", "--include_path", ".", "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=HARNESS, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["pass_key"]["exact_match,stripped"] == 1
