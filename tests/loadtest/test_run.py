"""A whole load test without vLLM: the order, the files, the exit code, the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from typer.testing import CliRunner

import loadtest.pictures
import loadtest.run
from loadtest.__main__ import app
from loadtest.judge import judge
from loadtest.prompts import Tokens
from loadtest.run import LoadTest, measure, order
from loadtest.scenario import LoadTestError
from loadtest.server import Server, command, serving
from loadtest.setting import Setting, setting, settings
from loadtest.traffic import complete
from tests.helpers.loadtest import BrokenBench, FakeBench, FakeServer, scenario

Load = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[Server]:
    with FakeServer().listening() as url:
        yield Server(url, "fake", "")


@pytest.fixture
def load(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs the small scenario against the fake server; gives what the command line gives. Drawing takes a second."""

    def run(bench: FakeBench, *flags: str, drawn: bool = False, **changes: Any) -> Any:
        monkeypatch.setattr(loadtest.run, "bench_client", bench.client)
        if not drawn:
            monkeypatch.setattr(loadtest.pictures, "svg", lambda figure: "<svg></svg>")
        (tmp_path / "s.yaml").write_text(scenario(**changes).model_dump_json())
        words = ["run", str(tmp_path / "s.yaml"), "--model", "some/<model>", "--url", server.url, *flags]
        return CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])

    return run


def test_the_control_runs_twice_first_and_the_others_in_a_drawn_order(tmp_path: Path) -> None:
    asked = settings("a,b,c,d,e,f")

    def names(seed: int) -> list[str]:
        wanted = scenario(seed=seed)
        return [one.name for one in order(LoadTest(wanted, "m", Setting("dense"), asked, None, (), tmp_path, ""))]

    assert names(0)[:2] == ["dense", "dense, again"]
    assert sorted(names(0)[2:]) == list("abcdef") and names(0) == names(0)
    assert len({tuple(names(seed)) for seed in range(5)}) > 1


def test_settings_and_their_servers() -> None:
    found = settings("tidal:reselect_layer=4:unit_tokens=32,dense")
    assert str(found[0]) == "tidal:reselect_layer=4:unit_tokens=32"
    words = command(found[0], "M", ["--max-model-len", "9"])
    expected = ["-m", "sparseserve", "serve", "M", "--policy", "tidal", "--set", "reselect_layer=4"]
    assert words[1:] == [*expected, "--set", "unit_tokens=32", "--max-model-len", "9"]
    assert settings("tidal:reselect_layer=[9,18],quest")[0].values == {"reselect_layer": [9, 18]}
    assert command(setting("vllm"), "M", [])[1:] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "M"]
    for bad in ("quest,quest", "quest:budget", ""):
        with pytest.raises(LoadTestError, match="Expected"):
            settings(bad)


def test_a_policy_that_is_refused_is_so_before_any_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "a warning\nsparseserve: $* is refused" >&2\nexit 2\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    flags = ("--block-size", "64")
    asked = LoadTest(scenario(), "m", Setting("vllm"), settings("tidl"), None, flags, tmp_path / "out", "")
    told = "tidl: sparseserve: -m sparseserve explain m --policy tidl --block-size 64 is refused$"
    with pytest.raises(LoadTestError, match=told):
        measure(asked, print)
    assert not [*(tmp_path / "out").iterdir()]


def test_a_good_policy_passes(load: Load, tmp_path: Path) -> None:
    bench = FakeBench({}, {"fake@quick": 0.5})
    result = load(bench, "--policies", "quick")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["role"] for one in found["settings"]] == ["control", "again", "policy"]
    quick = found["settings"][2]
    assert [(cell["load"], cell["sent"], cell["right"]) for cell in quick["cells"]] == [("c1", 12, 12), ("c2", 12, 12)]
    assert {one["outcome"] for one in quick["comparisons"] if one["metric"] == "tpot_p50"} == {"faster"}
    again = found["settings"][1]
    assert {one["outcome"] for one in again["comparisons"]} == {"no difference"}
    assert quick["cells"][0]["observed"]["density"] == 0.25
    assert quick["cells"][0]["observed"]["peak_kv_bytes"] == 3 * 2**20


def test_vllms_own_plots_can_read_every_run(load: Load, tmp_path: Path) -> None:
    load(FakeBench({}, {}), "--policies", "quick")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    labels = [(run["policy"], run["load"], run["run_number"]) for run in found]
    runs = [(load, number) for load in ("c1", "c2") for number in range(3)]
    assert labels == [(name, *run) for name in ("dense", "dense, again", "quick") for run in runs]
    assert all(isinstance(run["request_throughput"], float) and "ttfts" not in run for run in found)


def test_every_setting_is_sent_the_same_and_no_run_what_another_was(load: Load, tmp_path: Path) -> None:
    bench = FakeBench({}, {})
    load(bench, "--policies", "quick")
    flags = [dict(zip(words, words[1:], strict=False)) for words in bench.asked]
    assert [one["--served-model-name"] for one in flags] == 7 * ["fake@dense"] + 7 * ["fake@dense"] + 7 * ["fake@quick"]
    runs = [Path(one["--dataset-path"]).read_text() for one in flags]
    assert len(set(runs)) == len(runs)  # one server has one prefix cache
    names = [Path(one["--dataset-path"]).stem for one in flags]
    assert names[:7] == names[7:14] == ["warm-up", "c1-0", "c2-0", "c1-1", "c2-1", "c1-2", "c2-2"]


def test_servers_of_their_own_are_sent_the_same(tmp_path: Path, server: Server) -> None:
    asked = LoadTest(scenario(), "m", Setting("dense"), settings("quest"), None, (), tmp_path, "")
    bench: Any = FakeBench({}, {})
    for name in ("0-dense", "1-quest"):
        (tmp_path / name).mkdir()
        runner = loadtest.run.Runner(asked, server, bench, Tokens(1.0, True), tmp_path / name)
        runner.run(asked.scenario.loads[0], "c1-0", 4)
    first, second = ((tmp_path / name / "c1-0.jsonl").read_text() for name in ("0-dense", "1-quest"))
    assert first == second


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda _: "NOTHING.", "too few answers right, against the control: 0 of 12 at c1"),
        (lambda _: None, "requests failed, or came back empty or short: 12 of 12 at c1"),
        (lambda _: "", "came back empty or short: 12 of 12 at c1, 12 of 12 at c2"),
    ],
    ids=["wrong", "error", "empty"],
)
def test_a_broken_policy_is_flagged_by_name(answer: Any, told: str, load: Load, tmp_path: Path) -> None:
    result = load(FakeBench({"fake@broken": answer}, {}), "--policies", "quick,broken")
    assert result.exit_code == 1
    assert "flagged: broken" in result.output and told in result.output and "flagged: quick" not in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>broken</b>: flagged" in page and "<b>quick</b>: flagged" not in page and told in page


def test_a_control_that_knows_nothing_is_flagged(load: Load) -> None:
    result = load(FakeBench({"fake@dense": lambda _: "?"}, {}), "--policies", "quick")
    assert result.exit_code == 1 and "with this model answers tell nothing" in result.output


def test_a_policy_that_cannot_be_measured_is_flagged_and_the_others_are_measured(load: Load, tmp_path: Path) -> None:
    result = load(BrokenBench("fake@broken"), "--policies", "broken,quick")
    assert result.exit_code == 1
    assert "flagged: broken: not measured to its end: vllm bench serve failed" in result.output
    assert "flagged: quick" not in result.output
    found = {one["name"]: one for one in json.loads((tmp_path / "out" / "results.json").read_text())["settings"]}
    assert [cell["sent"] for cell in found["quick"]["cells"]] == [12, 12]
    assert [cell["sent"] for cell in found["broken"]["cells"]] == [0, 0]
    assert "no first answer" in (tmp_path / "out" / "report.html").read_text()


def test_a_control_that_cannot_be_measured_ends_the_test(load: Load) -> None:
    result = load(BrokenBench("fake@dense"), "--policies", "quick")
    assert isinstance(result.exception, LoadTestError)


def test_a_server_that_ends_while_it_starts_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "sparseserve: policy=quest\nleaks.sparseserve: no room\nINFO"\nexit 2\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    told = r"did not start \(exit code 2\), sparseserve: no room; its log is .*log$"
    with pytest.raises(LoadTestError, match=told), serving(Setting("quest"), "m", [], tmp_path / "log"):
        pass


class _Process:
    def __init__(self, title: str) -> None:
        self.title = title

    def cmdline(self) -> list[str]:
        return [self.title]


@pytest.mark.parametrize("titles", [["VLLM::EngineCore", "VLLM::Worker_TP0"], ["VLLM::EngineCore"]])
def test_on_one_gpu_the_engine_core_is_the_worker(titles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [_Process(title) for title in ["python serve /models/Worker", *titles]]
    monkeypatch.setattr(Server, "processes", lambda _: processes)
    assert Server("", "", "").worker() is processes[-1]


@pytest.fixture
def served(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[Any]]:
    """Measures long answers of `fake@dense`, its second server `fake@dense 1` and `fake@quest 2`; gives the judgement
    of each."""

    def run(answer: dict[str, Any]) -> list[Any]:
        started = count()

        @contextmanager
        def serving(setting: Setting, *_: Any) -> Iterator[Server]:
            yield Server(server.url, f"fake@{setting} {next(started)}", "")

        monkeypatch.setattr(loadtest.run, "check", lambda *_: None)
        monkeypatch.setattr(loadtest.run, "serving", serving)
        monkeypatch.setattr(loadtest.run, "bench_client", FakeBench(answer, {}).client)
        long = scenario(
            prompts={"kind": "reasoning", "length": 40}, answers="control", same_characters=8, output_tokens=16
        )
        asked = LoadTest(long, "m", Setting("dense"), settings("quest"), None, (), tmp_path, "")
        return judge(asked, measure(asked, lambda _: None), None).settings

    return run


def test_long_answers_begin_as_the_controls(served: Callable[..., list[Any]]) -> None:
    def after(characters: int) -> Any:
        return lambda prompt: prompt[:characters] + "!" * (16 - characters)

    same = {"fake@dense 0": after(16), "fake@dense 1": after(12)}
    control, again, quest = served(same | {"fake@quest 2": after(9)})
    assert control.problems == again.problems == quest.problems == []
    assert control.accuracy is None and again.accuracy.value == quest.accuracy.value == 1
    *_, garbage = served(same | {"fake@quest 2": after(0)})
    assert "too few answers like the control's, against the control: 0 of 12 at c1" in garbage.problems[0]
    found = served({"fake@dense 0": after(16), "fake@dense 1": after(2), "fake@quest 2": after(16)})
    assert all("answers tell nothing" in one.problems[0] for one in found)


def test_long_answers_cannot_be_compared_where_prompts_differ(load: Load, tmp_path: Path) -> None:
    long = {"prompts": {"kind": "reasoning", "length": 40}, "answers": "control", "same_characters": 8}
    result = load(FakeBench({}, {}), "--policies", "quick", **long)
    assert isinstance(result.exception, LoadTestError) and "refused with --url" in str(result.exception)


class _Page(HTMLParser):
    """What a page loads and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures = 0
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attributes if name in ("src", "href") and value]
        self.pictures += tag == "svg"

    def handle_data(self, data: str) -> None:
        self.said += data


def test_the_report_is_one_file_with_a_command_for_every_number(load: Load, tmp_path: Path) -> None:
    assert load(FakeBench({}, {"fake@quick": 0.5}), "--policies", "quick", drawn=True).exit_code == 0
    page = _Page((tmp_path / "out" / "report.html").read_text())
    assert all(link.startswith("#") for link in page.loaded)
    assert page.pictures == 4  # throughput against latency, goodput, Pareto, memory
    assert "some/<model>" in page.said and "time per token: faster" in page.said
    assert page.said.count("python -m loadtest.vllm_bench") == 3 * 2 * 3  # settings, loads, repeats
    for word in ("TTFT p50", "within SLO/s", "KV read", "25.0 %", "capacity gain", "preemptions"):
        assert word in page.said


def test_pictures_have_intervals(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list[Figure]()

    def svg(figure: Figure) -> str:
        drawn.append(figure)
        return "<svg></svg>"

    monkeypatch.setattr(loadtest.pictures, "svg", svg)
    load(FakeBench({"fake@none": lambda _: None}, {}), "--policies", "quick,none", drawn=True)
    throughput, _, pareto, _ = drawn
    assert len(throughput.axes) == 2
    for axes in (*throughput.axes, *pareto.axes):
        bars = [one for one in axes.containers if isinstance(one, ErrorbarContainer)]
        assert len(bars) == 3 and all(one.has_xerr and one.has_yerr for one in bars)  # the fourth has no latency


def test_accuracy_of_an_evaluation_is_joined(load: Load, tmp_path: Path) -> None:
    cells = [{"score": 0.5}, {"score": 1.0}]
    evaluated = {"settings": [{"policy": "quick", "values": {"unit_tokens": 32}, "cells": cells}]}
    (tmp_path / "eval.json").write_text(json.dumps(evaluated))
    load(FakeBench({}, {}), "--policies", "quick:unit_tokens=32", "--eval", str(tmp_path / "eval.json"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert [one["accuracy"] for one in found] == [None, None, {"value": 0.75, "interval": None}]
    page = _Page((tmp_path / "out" / "report.html").read_text()).said
    assert "quick:unit_tokens=32: 75.0 %" in page and "left out of the picture: dense; dense, again." in page
    (tmp_path / "eval.json").write_text("[]")
    result = load(FakeBench({}, {}), "--policies", "quick", "--eval", str(tmp_path / "eval.json"))
    assert isinstance(result.exception, LoadTestError)


def test_a_stream_tells_its_end() -> None:
    fake = FakeServer()
    with fake.listening() as url:
        asked = "The pass key of Bo is ABCDEFGH. The pass key of Bo is "
        whole = complete(Server(url, "fake", ""), asked, 16)
        assert (whole.text, whole.finish, whole.error, whole.tokens) == ("ABCDEFGH.", "stop", "", 9)
        fake.dies = True
        broken = complete(Server(url, "fake", ""), asked, 16)
        assert (broken.text, broken.finish) == ("ABC", "") and "EngineCore" in broken.error
