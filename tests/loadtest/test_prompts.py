"""Prompts are the same for the same seed, as long as asked for, and answered by what stands in them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loadtest.prompts import Prompt, Tokens, prompts, write_dataset
from loadtest.scenario import FOLDER, LoadTestError, Scenario, read_scenario
from tests.helpers.loadtest import right, scenario

BYTES, WORDS = Tokens(1.0, True), Tokens(4.0, False)
SHIPPED = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SHAPES: dict[str, dict[str, Any]] = {
    "documents": {"kind": "documents", "lengths": [700, 1400]},
    "turns": {"kind": "turns", "document": 4000, "conversations": 3},
    "agents": {"kind": "agents", "start": 700, "step": 300, "agents": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [BYTES, WORDS], ids=["bytes", "words"])
def test_the_answer_stands_in_the_prompt(shape: str, tokens: Tokens) -> None:
    made = prompts(scenario(prompts=SHAPES[shape], requests=12), "run", tokens)
    assert len(made) == 12
    for one in made:
        assert right(one.text) == f"{one.answer}."
        assert one.text.endswith("is " if tokens.spaces else "is")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_repeats_and_another_run_differs(shape: str) -> None:
    wanted = scenario(prompts=SHAPES[shape])
    first = prompts(wanted, "c1-0", BYTES)
    assert prompts(wanted, "c1-0", BYTES) == first
    assert not set(first) & set(prompts(wanted, "c1-1", BYTES))
    assert not set(first) & set(prompts(wanted.model_copy(update={"seed": 1}), "c1-0", BYTES))


def test_documents_have_their_lengths_in_turn() -> None:
    made = prompts(scenario(requests=5), "run", BYTES)
    assert [len(one.text) for one in made] == [600, 900, 600, 900, 600]
    made = prompts(scenario(requests=2), "run", WORDS)
    assert [len(one.text) for one in made] == [4 * 600 - 1, 4 * 900 - 1]  # without the last space


def test_conversations_share_the_document_and_every_turn_extends_the_last() -> None:
    made = prompts(scenario(prompts=SHAPES["turns"], requests=9), "run", BYTES)
    assert len({one.text[:3900] for one in made}) == 1
    for speaker in range(3):
        texts, answers = zip(*[(one.text, one.answer) for one in made[speaker::3]], strict=True)
        assert all(
            text.startswith(before + answer) for before, answer, text in zip(texts, answers, texts[1:], strict=False)
        )
        assert len(set(answers)) == 3


def test_agents_grow_by_a_step() -> None:
    made = prompts(scenario(prompts=SHAPES["agents"], requests=8), "run", BYTES)
    for agent in range(2):
        texts = [one.text for one in made[agent::2]]
        assert all(300 <= len(after) - len(before) <= 400 for before, after in pairwise(texts))
        assert all(after.startswith(before) for before, after in pairwise(texts))


def test_reasoning_has_no_answer() -> None:
    shape = {"kind": "reasoning", "length": 300}
    made = prompts(scenario(prompts=shape, answers="control", same_characters=8), "run", BYTES)
    assert [(len(one.text), one.answer) for one in made] == [(300, None)] * 4


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("tick tock " * 500)
    made = prompts(scenario(text=tmp_path / "text"), "run", BYTES)
    assert re.match(r"[tick o]{30}", made[0].text)
    with pytest.raises(LoadTestError, match="none.txt cannot be read"):
        prompts(scenario(text=tmp_path / "none.txt"), "run", BYTES)


def test_the_dataset_is_what_vllm_bench_serve_takes(tmp_path: Path) -> None:
    write_dataset([Prompt("a\nb", "X"), Prompt("c", None)], 7, tmp_path / "d.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["output_tokens"]) for row in rows] == [("a\nb", 7), ("c", 7)]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_scenario_that_ships_can_be_read(name: str) -> None:
    found = read_scenario(name)
    assert found.name == name
    assert len(prompts(found, "run", BYTES, requests=3)) == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"repeats": 1}, "repeats"),
        ({"loads": [{"concurrency": 1, "request_rate": 2.0}]}, "one of concurrency and request_rate"),
        ({"loads": [{"concurrency": 1}, {"concurrency": 1}]}, "every load is given once"),
        ({"prompts": {"kind": "reasoning", "length": 9}}, "reasoning has no needles"),
        ({"answers": "control"}, "same_characters is given where answers is control"),
        ({"same_characters": 8}, "same_characters is given where answers is control"),
        ({"goodput": 3}, "goodput"),
    ],
)
def test_a_bad_scenario_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = json.loads(scenario().model_dump_json(exclude_none=True)) | changes
    (tmp_path / "bad.yaml").write_text(json.dumps(content))
    with pytest.raises(LoadTestError, match=message):
        read_scenario(str(tmp_path / "bad.yaml"))


def test_an_unknown_name_tells_those_that_ship() -> None:
    with pytest.raises(LoadTestError, match="long-document-qa"):
        read_scenario("long-documents")


def test_scenarios_are_all_kinds() -> None:
    kinds = {read_scenario(name).prompts.kind for name in SHIPPED}
    assert kinds == {"documents", "turns", "agents", "reasoning"}
    assert isinstance(read_scenario("demo"), Scenario)
