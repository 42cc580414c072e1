"""Runs that are killed, go on, or cannot; against servers that only pretend."""

from __future__ import annotations

import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from sparseserve.cli import app
from sparseserve.errors import ConfigError, SparseServeError
from sparseserve.evaluation import run
from sparseserve.evaluation.evaluation import Evaluation, Setting, settings
from sparseserve.evaluation.perplexity import bits
from sparseserve.evaluation.results import Results
from sparseserve.evaluation.run import evaluate, partial_file
from tests.helpers.evaluation import FakeClient, Fakes, FakeServer

BOTH = settings("dense,quest", [512])
REQUEST = Evaluation(model="model", settings=BOTH, lengths=(700, 900), tasks=("needle",), samples=3, recall=False)
CELLS = 2 * 2 * 3  # settings, lengths, depths


def test_a_run_asks_all_settings_the_same(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    results = evaluate(REQUEST, tmp_path / "RESULTS.json", serve=fakes)
    assert fakes.served == ["dense", "quest:budget_tokens=512"]
    dense, quest = ([body for path, body in fake.requests if "completions" in path] for fake in fakes.servers)
    assert dense == quest and len(dense) == CELLS * 3 / 2
    assert [path for path, _ in fakes.servers[1].requests].count(
        "/tokenize"
    ) == 4  # to learn how to ask; prompts are known by now
    assert {cell.score for setting in results.settings for cell in setting.cells} == {1.0}
    at = results.settings[1].lengths[0]
    assert (at.density, at.timed_tokens) == (0.25, 3 * 3 * 7)
    assert results.settings[1].values == {"budget_tokens": 512}


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = evaluate(REQUEST, tmp_path / "whole.json", serve=Fakes(tmp_path))
    output = tmp_path / "RESULTS.json"
    told = r"quest:budget_tokens=512: cell needle 700 tokens at 0\.5: the server ended with exit code -9\. .* kept in"
    with pytest.raises(SparseServeError, match=told) as error:
        evaluate(REQUEST, output, serve=_dying_at(tmp_path, 5))
    assert "the same command goes on there" in str(error.value) and "loading ... Killed" in str(error.value)
    with partial_file(output).open("a") as file:
        file.write('{"key": "cut sh')  # as a kill may leave it
    fakes = Fakes(tmp_path)
    results = evaluate(REQUEST, output, serve=fakes)
    assert fakes.served == ["quest:budget_tokens=512"]
    assert fakes.servers[0].asked == (CELLS // 2 - 1) * 3
    cells = [[cell.scores for setting in each.settings for cell in setting.cells] for each in (whole, results)]
    assert cells[0] == cells[1]
    fakes = Fakes(tmp_path)
    evaluate(REQUEST, output, serve=fakes)
    assert fakes.served == []


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "RESULTS.json"
    evaluate(REQUEST, output, serve=Fakes(tmp_path))
    other = REQUEST.model_copy(update={"samples": 5})
    with pytest.raises(ConfigError, match=r"samples = 3, not 5.*delete .*RESULTS\.partial\.jsonl"):
        evaluate(other, output, serve=Fakes(tmp_path))


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "RESULTS.json"
    evaluate(REQUEST, output, serve=Fakes(tmp_path))
    monkeypatch.setattr(run, "versions", lambda: {"vllm": "0.33.0"})
    with pytest.raises(ConfigError, match=r"versions = .*, not {'vllm': '0\.33\.0'}"):
        evaluate(REQUEST, output, serve=Fakes(tmp_path))


@pytest.mark.parametrize("name", ["plan.json", "folder/full_attention_heads.tsv"])
def test_another_artifact_of_the_same_name_is_measured_anew(tmp_path: Path, name: str) -> None:
    (file := tmp_path / name).parent.mkdir(exist_ok=True)
    plan = Setting(policy="moa", pairs=(f"artifact={tmp_path / name.split('/')[0]}",))
    request = REQUEST.model_copy(update={"settings": (Setting(policy="dense"), plan)})
    output = tmp_path / "RESULTS.json"
    file.write_text("a plan")
    evaluate(request, output, serve=Fakes(tmp_path))
    file.write_text("another plan")
    fakes = Fakes(tmp_path)
    evaluate(request, output, serve=fakes)
    assert fakes.served == [str(plan)]


def test_a_command_asks_the_same_questions_again(tmp_path: Path) -> None:
    """The commands in the results, typed in again, make requests whose cells score the same."""
    results = evaluate(REQUEST, serve=Fakes(tmp_path))
    asked: list[Evaluation] = []
    for setting in results.settings:
        for command in [setting.command, setting.lengths[0].command, *(cell.command for cell in setting.cells)]:
            asked.append(typed(command, tmp_path))
    cell = results.settings[1].cells[-1]
    assert asked[-1].settings == (Setting(policy="quest", pairs=("budget_tokens=512",)),)
    assert (asked[-1].tasks, asked[-1].lengths, asked[-1].depths) == ((cell.task,), (cell.length,), (cell.depth,))
    assert typed(results.command, tmp_path) == REQUEST


def typed(command: str, folder: Path) -> Evaluation:
    """The request that a command makes."""
    seen: list[Evaluation] = []

    def evaluate(request: Evaluation, *_: object) -> None:
        seen.append(request)
        raise SparseServeError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run, "evaluate", evaluate)
        CliRunner().invoke(app, shlex.split(command)[1:])
    return seen[0]


def test_the_command_writes_results_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "evaluate", partial(evaluate, serve=Fakes(tmp_path)))
    words = "eval model --policies dense --lengths 700 --tasks needle --samples 2 --no-recall --max-model-len 900"
    done = CliRunner().invoke(app, words.split(), env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    results = Results.model_validate_json((tmp_path / "RESULTS.json").read_text())
    assert results.command.endswith("--output RESULTS.json --max-model-len 900")
    assert not list(tmp_path.glob("*.jsonl"))
    assert "1.00  [0.61, 1.00]" in done.output and "KV read   25.0%" in done.output
    assert results.settings[0].lengths[0].command in done.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--policies dense,qest", ["--policies = qest", "Did you mean 'quest'"]),
        ("--policies quest:budget=5", ["budget = 5", "Did you mean 'budget_tokens'"]),
        ("--policies hip --budgets 512", ["sink_tokens + recent_tokens = 1280 exceed budget_tokens = 512"]),
        ("--policies dense --tasks needles", ["--tasks = needles", "Did you mean 'needle'"]),
        ("--policies dense --lengths 2k", ["--lengths = 2k", "4096,32768"]),
        ("--policies dense --depths 50", ["--depths = 50", "0 to 1"]),
        ("--policies dense --samples 0", ["--samples = 0"]),
        ("--policies dense --seed -1", ["--seed = -1", "0 or more"]),
        ("--policies dense --text empty.txt", ["--text = empty.txt", "a file with text in it"]),
        ("--policies dense --text missing.txt", ["--text = missing.txt", "No such file"]),
    ],
)
def test_what_cannot_be_is_told_before_a_server_starts(
    words: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    monkeypatch.setattr(run, "evaluate", partial(evaluate, serve=_no_server))
    done = CliRunner().invoke(app, ["eval", "model", *words.split()])
    assert done.exit_code == 2
    assert [text for text in told if text not in done.output] == []


def test_a_variable_that_would_reach_every_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESERVE_SET_BUDGET_TOKENS", "512")
    with pytest.raises(ConfigError, match="SPARSESERVE_SET_BUDGET_TOKENS = 512 .* unset"):
        evaluate(REQUEST)


def test_a_length_over_the_models_is_refused(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, partial(FakeServer, max_len=720))
    with pytest.raises(ConfigError, match=r"--lengths = 700 is refused. Expected: at most 680: the context of 720"):
        evaluate(REQUEST, serve=fakes)
    assert fakes.servers[0].asked == 0


def test_all_lengths_are_checked_before_any_is_measured(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, partial(FakeServer, max_len=900))
    with pytest.raises(ConfigError, match=r"--lengths = 900 is refused. Expected: at most 860: the context of 900"):
        evaluate(REQUEST, serve=fakes)
    assert fakes.servers[0].asked == 0


def test_how_long_was_waited_for_a_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SERVE", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(run, "STARTUP_TIMEOUT", 1.0)
    with pytest.raises(SparseServeError, match="^dense: the server did not start after 1 s"):
        evaluate(REQUEST)


def test_a_server_that_does_not_start_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SERVE", [sys.executable, "-c", "import sys; sys.exit(f'sparseserve: no {sys.argv[1]}')"])
    with pytest.raises(
        SparseServeError, match=r"(?s)^dense: the server ended with exit code 1 after .*sparseserve: no model"
    ):
        evaluate(REQUEST)


def test_settings() -> None:
    policies = "dense,quest:unit_tokens=16,streaming:sink_tokens=8,quest:budget_tokens=256"
    texts = [str(setting) for setting in settings(policies, [512, 1024])]
    assert texts == [
        "dense",
        "quest:unit_tokens=16:budget_tokens=512",
        "quest:unit_tokens=16:budget_tokens=1024",
        "streaming:sink_tokens=8:recent_tokens=504",
        "streaming:sink_tokens=8:recent_tokens=1016",
        "quest:budget_tokens=256",
    ]
    (hip,) = settings("hip:chunk_tokens=[64,16,2]:wide_layers=0", [])
    assert hip.values() == {"chunk_tokens": [64, 16, 2], "wide_layers": 0}
    assert settings(",".join(texts), []) == settings(",".join(texts), [512])  # what is given stays


def test_bits_are_of_the_bytes_of_separate_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that gives every token 1/4."""
    forced: list[tuple[list[int], list[int]]] = []

    def force(prompt: list[int], tokens: list[int]) -> list[float]:
        forced.append((prompt, tokens))
        return [-math.log(4)] * len(tokens)

    client = FakeClient("bytes")
    monkeypatch.setattr(client, "force", force)
    text = "".join(chr(33 + index % 90) for index in range(6000)) + "é" * 100
    total, counted = bits(client, text, 1000, 5)
    assert total == pytest.approx(2 * 5 * 256) and counted == 5 * 256
    for prompt, tokens in forced:
        assert len(prompt) == 999 and prompt[0] == 256
        said = "".join(map(chr, [*prompt[1:], *tokens]))
        assert said in text and len(tokens) == 257
    starts = ["".join(map(chr, tokens)) for _, tokens in forced]
    assert len(set(starts)) == 5
    with pytest.raises(ConfigError, match=r"--text = too short .* 5900 tokens"):
        bits(client, text, 5900, 5)


def test_a_text_that_begins_with_long_tokens_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first 16000 characters hold 1000 tokens only from a place on that their mean does not tell."""
    client = FakeClient("words")
    monkeypatch.setattr(client, "force", lambda prompt, tokens: [0.0] * len(tokens))
    text = "abc" * 1500 + "." * 11500 + "." * 20000  # three letters a token, then one
    _, counted = bits(client, text, 3000, 4)
    assert counted == 4 * 256


def _no_server(request: Evaluation, setting: Setting) -> NoReturn:
    raise AssertionError("a server starts")


def _dying_at(folder: Path, request: int) -> Fakes:
    """The first server is well, the second dies."""
    fakes = Fakes(folder)
    fakes.make = lambda process: FakeServer(process, dies_at=request if fakes.servers else None)
    return fakes
