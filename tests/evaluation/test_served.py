"""Real servers: the numbers are those that transformers gives, and those that the policy must have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.demo.questions import prose
from sparseserve.evaluation.client import Client
from sparseserve.evaluation.request import Request, Setting, settings
from sparseserve.evaluation.results import Results
from sparseserve.evaluation.run import Serve, evaluate
from sparseserve.evaluation.tasks import TASKS, draft
from sparseserve.server.process import Server

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.e2e

LENGTH = 1500


def only(server: Server) -> Serve:
    """A server that is there already, whatever is asked for."""

    @contextmanager
    def serve(request: Request, setting: Setting) -> Iterator[Server]:
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
    request = Request(
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
    request = Request(
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
