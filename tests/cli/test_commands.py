"""The `sparseserve` command as users type it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from sparseserve.cli import app, serve
from sparseserve.config import policy_file_schema
from sparseserve.errors import SparseServeError
from sparseserve.evaluation.evaluation import Evaluation
from sparseserve.policies import POLICIES, Quest

run = CliRunner().invoke


def test_policies_lists_names_keys_and_papers() -> None:
    output = run(app, ["policies"], env={"COLUMNS": "160"}).output
    for name, cls in POLICIES.items():
        assert name in output
        assert all(key in output for key in cls.model_fields)
    assert "budget_tokens=1024" in output
    assert "artifact=(required)" in output


def test_policies_as_json() -> None:
    described = {policy["name"]: policy for policy in json.loads(run(app, ["policies", "--json"]).output)}
    assert list(described) == list(POLICIES)
    assert described["quest"]["paper"] == Quest.papers["Quest"] == "https://arxiv.org/abs/2406.10774"
    assert described["quest"]["parameters"]["unit_tokens"]["enum"] == [16, 32, 64]
    assert "default" not in described["moa"]["parameters"]["artifact"]


def test_policies_prints_the_schema_of_a_policy_file() -> None:
    assert json.loads(run(app, ["policies", "--schema"]).output) == policy_file_schema()


def test_policies_needs_no_vllm() -> None:
    program = "import sys; from sparseserve.cli import app; app(['policies'], standalone_mode=False); "
    program += "sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


def test_serve_hands_vllm_its_options_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def supervise(command: list[str]) -> int:
        commands.append(command)
        return 3

    monkeypatch.setattr(serve, "supervise", supervise)
    theirs = ["org/model", "-tp", "2", "--port=9000", "--additional-config.a.b", "1", "-O3", "--no-enable-log-requests"]
    ours = ["--policy", "quest", "--set", "budget_tokens=512", "--set", "sink_tokens=8"]
    assert run(app, ["serve", *theirs[:3], *ours, *theirs[3:]]).exit_code == 3
    assert commands == [[sys.executable, "-m", "sparseserve.server", *ours, "--", *theirs]]


def test_serve_refuses_a_bad_policy_without_a_traceback() -> None:
    command = [sys.executable, "-m", "sparseserve", "serve", "no-such-model", "--policy", "qest"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "policy = qest" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "missing", "extras"),
    [
        ("serve model --policy dense", "vllm", ["cpu", "cuda"]),
        ("explain model --policy dense", "vllm", ["cpu", "cuda"]),
        ("demo", "openai", ["evaluate"]),
        ("demo", "vllm", ["cpu", "cuda"]),
        ("eval model --policies dense", "openai", ["evaluate"]),
        ("eval model --policies dense", "scipy", ["evaluate"]),
        ("eval model --policies dense", "vllm", ["cpu", "cuda"]),
        ("tune model --max-loss 1%", "openai", ["evaluate"]),
        ("tune model --max-loss 1%", "vllm", ["cpu", "cuda"]),
        ("calibrate moa model --output out", "scipy", ["calibrate"]),
        ("calibrate retrieval-heads model --output out", "scipy", ["calibrate"]),
        ("calibrate seer model --output out", "transformers", ["calibrate"]),
        ("calibrate tidal model --output out", "transformers", ["calibrate"]),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    words: str, missing: str, extras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_spec
    monkeypatch.setattr("sparseserve.cli.extras.find_spec", lambda name: None if name == missing else found(name))
    monkeypatch.setitem(sys.modules, missing, None)
    done = run(app, words.split())
    assert done.exit_code == 2 and f"package = {missing}, not installed" in done.output
    assert [extra for extra in extras if f'pip install "sparseserve[{extra}]"' not in done.output] == []


@pytest.mark.parametrize("command", ["eval model --policies dense", "tune model --max-loss 1%"])
def test_options_of_vllm_with_one_dash_are_passed_on_whole(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ["-cc.mode=3", "-O.mode=3", "-tp", "2"]
    asked: list[Evaluation] = []

    def check(request: Evaluation) -> None:
        asked.append(request)
        raise SparseServeError("enough")

    monkeypatch.setattr(Evaluation, "check", check)
    run(app, [*command.split(), *theirs])
    assert asked[0].vllm == tuple(theirs)


def test_the_model_comes_first() -> None:
    for words in ("eval -tp 2 model --policies dense", "tune -tp 2 model --max-loss 1%"):
        done = run(app, words.split())
        assert done.exit_code == 2 and "MODEL = -tp" in done.output and "before any option" in done.output
