"""The report says what was measured, with a command beside every number, and is one file."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sparseserve.artifacts import Artifact, save
from sparseserve.tuning.judge import Verdict, choose
from sparseserve.tuning.report import Tuning, render, write_report
from tests.helpers.made_up import Lab

RIGHT, HALF = (1.0, 1.0), (1.0, 0.0)


@pytest.fixture
def tuning(lab: Lab, tmp_path: Path) -> Tuning:
    heads = {"scores": torch.rand(3, 4, dtype=torch.float64)}
    arguments = {"scores": "sparseserve", "per": "kv_head", "sink_tokens": 4, "recent_tokens": 256}
    save(Artifact("retrieval", heads, {**arguments, "rule": {"threshold": 0.5}}, 3, 4), tmp_path / "heads.safetensors")
    dense = lab.setting("dense", {"single": RIGHT}, ms=20, density=1.0, min_tokens=9000)
    settings = [
        lab.setting("quest", {"single": RIGHT}, ms=8, budget_tokens=512),
        lab.setting("streaming", {"single": HALF}, ms=5, density=0.1),
        lab.setting("retrieval", {"single": RIGHT}, ms=12, density=0.5, artifact=str(tmp_path / "heads.safetensors")),
    ]
    baseline, judged = lab.judged(dense, dense), [lab.judged(one, dense) for one in settings]
    return Tuning(
        model="some/<model>",
        objective="latency",
        max_loss=0.01,
        command="sparseserve tune some/model",
        baseline=baseline,
        again=lab.judged(lab.setting("dense", {"single": RIGHT}, ms=21, density=1.0, min_tokens=9000), dense),
        noise=0.048,
        judged=judged,
        untried={"hip": "the budget is too small"},
        verdict=choose(judged, baseline, "latency", 0.01, noise=0.05),
        measured=lab.results([dense, *settings]),
    )


class Balanced(HTMLParser):
    """Collects what the page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "link"):
            self.loaded.append(tag)


def test_every_number_has_its_command(tuning: Tuning) -> None:
    page = render(tuning)
    for one in [tuning.baseline, *tuning.judged, tuning.again]:
        assert one.result.command in page
        for cell in one.result.cells:
            assert cell.command in page
    assert "hip" in page and "the budget is too small" in page
    assert "prove" in page.replace("\n", " ")  # eight questions cannot prove 1 %


def test_it_is_one_file_and_escapes_names(tuning: Tuning, tmp_path: Path) -> None:
    write_report(tuning, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.loaded == [] and "some/&lt;model&gt;" in page
    assert page.count("<svg") == 2 + 4 + 1 + 1  # two fronts, four grids, recall, one head map


def test_it_says_which_recall_was_measured_without_freeing_pages(tuning: Tuning) -> None:
    page = render(tuning)
    assert page.count("(shared)") == 2 + 1 and "kv_memory=shared" in page  # streaming, retrieval, what it means
    quest = replace(tuning, judged=tuning.judged[:1])
    assert "shared" not in render(quest)


def test_without_a_choice_it_says_so(tuning: Tuning) -> None:
    page = render(replace(tuning, verdict=Verdict(None, "no setting is faster")))
    assert "No recommendation" in page and "no setting is faster" in page
