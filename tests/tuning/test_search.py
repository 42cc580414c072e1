"""What the search measures, in which order, and what survives of a kill; the servers are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparseserve.cli.tune import show
from sparseserve.config import read_policy_file
from sparseserve.demo.build import build
from sparseserve.errors import FileError, TuningError
from sparseserve.evaluation.evaluation import Evaluation, Setting, settings
from sparseserve.evaluation.pieces import Piece
from sparseserve.evaluation.results import Results
from sparseserve.evaluation.run import partial_file
from sparseserve.tuning.judge import Objective
from sparseserve.tuning.report import Tuning
from sparseserve.tuning.run import OWN_ATTENTION, Asked, Evaluate, tune, write_policy
from sparseserve.tuning.search import budgets, families, with_budgets
from tests.helpers.made_up import Lab

RIGHT, HALF = (1.0, 1.0), (1.0, 0.0)
VLLM = ("--max-model-len", "9216", "--enforce-eager")


class Servers:
    """Answers right down to a budget for each policy, faster the smaller it is; remembers what was asked."""

    def __init__(self, lab: Lab, enough: dict[str, int]) -> None:
        self.lab, self.enough, self.asked = lab, enough, list[tuple[str, bool]]()

    def __call__(self, request: Evaluation, output: Path, progress: Callable[[int, int, str], None]) -> Results:
        (setting,) = request.settings
        self.asked.append((str(setting), request.recall))
        budget = int(setting.values().get("budget_tokens", setting.values().get("recent_tokens", 8192)))
        right = budget >= self.enough.get(setting.policy, 0)
        result = self.lab.setting(
            setting.policy,
            {"needle": RIGHT if right else HALF},
            ms=20 if setting == OWN_ATTENTION else 4 + budget / 1024,
            density=min(1.0, budget / 8192),
            **setting.values(),
        )
        return self.lab.results([result])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("demo") / "model"
    build(path)
    return str(path)


def ask(
    model: str,
    policies: str,
    tokens: list[int],
    evaluate: Evaluate,
    folder: Path,
    objective: Objective = "latency",
) -> Tuning:
    request = Evaluation(
        model=model, settings=settings(policies, tokens), lengths=(8192,), tasks=("needle",), vllm=VLLM
    )
    asked = Asked(request, objective, 0.01, "sparseserve tune")
    return tune(asked, folder / "partial", lambda done, total, piece: None, evaluate)


def test_a_family_goes_down_until_it_loses_too_much(model: str, lab: Lab, tmp_path: Path) -> None:
    servers = Servers(lab, {"quest": 1000, "streaming": 10**6})
    tuning = ask(model, "quest,streaming", [512, 1024, 2048, 256], servers, tmp_path)
    measured = [name for name, recall in servers.asked if not recall]
    quest = [name for name in measured if name.startswith("quest")]
    assert quest == [f"quest:budget_tokens={budget}" for budget in (2048, 1024, 512)]
    assert [name for name in measured if name.startswith("streaming")] == ["streaming:recent_tokens=2044"]
    assert measured[0] == measured[-1] == str(OWN_ATTENTION)  # first and last, for the noise
    assert set(tuning.untried) == {"quest:budget_tokens=256"} | {
        f"streaming:recent_tokens={n - 4}" for n in (256, 512, 1024)
    }
    assert tuning.verdict.chosen is not None and tuning.verdict.chosen.setting.values() == {"budget_tokens": 1024}


def test_recall_is_measured_of_the_best_alone(model: str, lab: Lab, tmp_path: Path) -> None:
    servers = Servers(lab, {"quest": 1000})
    ask(model, "quest", [512, 1024, 2048], servers, tmp_path)
    assert [name for name, recall in servers.asked if recall] == ["quest:budget_tokens=1024"]


def test_memory_takes_what_rows_store(model: str, lab: Lab, tmp_path: Path) -> None:
    tuning = ask(model, "quest,streaming", [1024], Servers(lab, {}), tmp_path, objective="memory")
    stored = {one.setting.policy: one.stored / tuning.baseline.stored for one in tuning.judged}
    assert stored["quest"] == pytest.approx(1 + 1 / 32)
    assert stored["streaming"] == pytest.approx(9 / 64)  # pages of 128 tokens
    assert tuning.verdict.chosen is not None and tuning.verdict.chosen.setting.policy == "streaming"


def test_recall_of_what_frees_pages_is_measured_with_all_of_them() -> None:
    served = {policy: Piece("recall", Setting(policy=policy), 8192).served for policy in ("streaming", "quest")}
    assert served["streaming"].values() == {"kv_memory": "shared", "recall_sample": 1}
    assert served["quest"].values() == {"recall_sample": 1}
    assert Piece("cell", Setting(policy="streaming"), 8192).served.load().frees_pages


def test_the_policy_file_is_what_serve_reads(model: str, lab: Lab, tmp_path: Path) -> None:
    tuning = ask(model, "quest", [1024], Servers(lab, {}), tmp_path)
    write_policy(tuning, tmp_path / "policy.yaml")
    assert read_policy_file(str(tmp_path / "policy.yaml")) == {model: {"policy": "quest", "budget_tokens": 1024}}
    assert "0 of 8 questions answered worse" in (tmp_path / "policy.yaml").read_text()


def test_the_baseline_is_timed_again_after_what_a_later_run_measures(model: str, lab: Lab, tmp_path: Path) -> None:
    class Keeping(Servers):
        """Asks nothing again that is in the file."""

        def __call__(self, request: Evaluation, output: Path, progress: Callable[[int, int, str], None]) -> Results:
            file, key = partial_file(output), f"{request.settings[0]} {request.recall}\n"
            known = file.is_file() and key in file.read_text().splitlines(keepends=True)
            with file.open("a") as keep:
                keep.write("" if known else key)
            results = super().__call__(request, output, progress)
            self.asked = self.asked[:-1] if known else self.asked
            return results

    runs = [Keeping(lab, {}) for _ in range(3)]
    for servers, policies in zip(runs, ["quest", "quest", "quest,tidal:reselect_layer=4"], strict=True):
        ask(model, policies, [1024], servers, tmp_path)
    first, same, more = ([name for name, recall in servers.asked if not recall] for servers in runs)
    own, tidal = str(OWN_ATTENTION), "tidal:reselect_layer=4:budget_tokens=1024"
    assert first == [own, "quest:budget_tokens=1024", own]
    assert same == []
    assert more == [tidal, own]


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(model: str, lab: Lab, tmp_path: Path) -> None:
    servers = Servers(lab, {})
    with pytest.raises(FileError, match=r"nodir/partial is refused.*check --output"):
        ask(model, "quest", [1024], servers, tmp_path / "nodir")
    assert servers.asked == []


def test_what_few_questions_cannot_rule_out_is_printed(
    model: str, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(ask(model, "quest", [1024], Servers(lab, {}), tmp_path), Console(width=200))
    told = "0 of 8 questions answered worse than by dense attention; with 95 % confidence at most 31.2% of such"
    assert told in capsys.readouterr().out


def test_without_a_gain_nothing_is_written(model: str, lab: Lab, tmp_path: Path) -> None:
    tuning = ask(model, "quest", [512], Servers(lab, {"quest": 1000}), tmp_path)
    with pytest.raises(TuningError, match="no setting within 1.0%"):
        write_policy(tuning, tmp_path / "policy.yaml")
    assert not (tmp_path / "policy.yaml").exists()


def test_what_cannot_be_served_is_listed_with_its_reason(model: str, lab: Lab, tmp_path: Path) -> None:
    tuning = ask(model, "quest,tidal", [1024], Servers(lab, {}), tmp_path)
    (name,) = tuning.untried
    assert name.startswith("tidal") and "reselect_layer is missing" in tuning.untried[name]
    with pytest.raises(TuningError, match="reselect_layer is missing"):
        ask(model, "tidal", [1024], Servers(lab, {}), tmp_path)


def test_families_differ_in_the_budget_alone() -> None:
    found = families(settings("tidal:reselect_layer=4,quest,tidal:reselect_layer=3,dense", [512, 1024]))
    assert [[str(one) for one in family] for family in found] == [
        ["tidal:reselect_layer=4:budget_tokens=1024", "tidal:reselect_layer=4:budget_tokens=512"],
        ["quest:budget_tokens=1024", "quest:budget_tokens=512"],
        ["tidal:reselect_layer=3:budget_tokens=1024", "tidal:reselect_layer=3:budget_tokens=512"],
        ["dense"],
    ]


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ("moa:artifact=a,moa:artifact=b", [["moa:artifact=a"], ["moa:artifact=b"]]),
        (
            "seer:artifact=a:threshold=0.1,seer:artifact=a:threshold=0.2",
            [["seer:artifact=a:threshold=0.1"], ["seer:artifact=a:threshold=0.2"]],
        ),
        (
            "tidal:budget_tokens=64:reselect_layer=3,tidal:budget_tokens=64:reselect_layer=4",
            [["tidal:budget_tokens=64:reselect_layer=3"], ["tidal:budget_tokens=64:reselect_layer=4"]],
        ),
        (
            "quest:budget-tokens=512:bound=min_max,quest:bound=mean_std:budget_tokens=256,quest",  # 1024 of itself
            [["quest:budget-tokens=512:bound=min_max"], ["quest", "quest:bound=mean_std:budget_tokens=256"]],
        ),
    ],
)
def test_the_budget_is_told_by_its_key_wherever_it_stands(policies: str, expected: list[list[str]]) -> None:
    assert [[str(one) for one in family] for family in families(settings(policies, []))] == expected


def test_usual_budgets() -> None:
    assert budgets([2048, 8192]) == [256, 512, 1024, 2048, 4096]
    assert budgets([300]) == [256]


def test_usual_budgets_that_a_policy_cannot_have_are_left_out() -> None:
    def named(*lengths: int) -> list[str]:
        return [str(one) for one in with_budgets(settings("hip,quest", ()), lengths)]

    quest = [f"quest:budget_tokens={budget}" for budget in (256, 512, 1024, 2048)]
    assert named(4096) == ["hip:budget_tokens=2048", *quest]
    assert named(2048) == ["hip", *quest[:3]]  # its sink and recent tokens alone are 1280
