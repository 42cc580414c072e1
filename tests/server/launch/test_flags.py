"""`sparseserve serve`: what is added for the API server, and where it may write."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparseserve import ops
from sparseserve.cli import app, serve
from sparseserve.config import find_policy
from sparseserve.errors import ConfigError, UnsupportedError
from sparseserve.server.launch import serve as launch
from sparseserve.server.launch.serve import Launch, prepare

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "sparseserve")
    monkeypatch.setattr(ops, "isa", lambda: "portable")


def start(model: str, *flags: str, policy: str = "quest", sets: tuple[str, ...] = ("budget_tokens=512",)) -> Launch:
    return prepare(find_policy(policy, sets, {}), [model, "--skip-tokenizer-init", *flags])


@pytest.mark.parametrize("own", [["a", "b"], ["a", "b", "a@dense"]])
def test_aliases_are_listed_after_the_names_of_the_user(models: dict[str, str], own: list[str]) -> None:
    names = start(models["llama"], "--served-model-name", *own).args.served_model_name
    assert names[:2] == ["a", "b"]
    endings = ["dense", "budget-256", "budget-512", "budget-1024", "budget-2048"]
    assert names[2:] == [f"{name}@{ending}" for name in ("a", "b") for ending in endings]


def test_a_model_without_a_name_keeps_its_path_as_its_name(models: dict[str, str]) -> None:
    names = start(models["llama"]).args.served_model_name
    assert names[:2] == [models["llama"], f"{models['llama']}@dense"]


@pytest.mark.parametrize(
    ("policy", "sets", "names"),
    [
        ("quest", ("per_request=false",), ["a"]),
        ("dense", (), ["a"]),
        ("streaming", (), ["a"]),  # frees what dense attention would need
        ("streaming", ("kv_memory=shared",), ["a", "a@dense"]),
    ],
)
def test_only_choices_that_change_something_are_listed(
    models: dict[str, str], policy: str, sets: tuple[str, ...], names: list[str]
) -> None:
    started = start(models["llama"], "--served-model-name", "a", policy=policy, sets=sets)
    assert started.args.served_model_name == names


@pytest.mark.parametrize(
    ("flags", "seconds"), [([], 30), (["--shutdown-timeout", "0"], 0), (["--shutdown-timeout=7"], 7)]
)
def test_a_server_has_time_to_drain(models: dict[str, str], flags: list[str], seconds: int) -> None:
    started = start(models["llama"], *flags)
    assert started.args.shutdown_timeout == seconds
    words = shlex.split(started.command)
    last = len(words) - words[::-1].index("--shutdown-timeout")
    assert words[last] == str(seconds)


def test_the_cap_on_bodies_reaches_the_api_server_and_the_printed_command(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSESERVE_MAX_REQUEST_BYTES", "1")  # the flag wins
    monkeypatch.setattr("vllm.entrypoints.cli.serve.ServeSubcommand.cmd", lambda args: None)
    flags = ["--policy", "quest", "--max-request-bytes", "1000"]
    assert launch.main([*flags, "--", models["llama"], "--skip-tokenizer-init"]) == launch.SERVER_ENDED
    assert "SPARSESERVE_MAX_REQUEST_BYTES=1000 " in capsys.readouterr().err


@pytest.mark.parametrize(("given", "code"), [("1000", 0), ("0", 2), ("32M", 2)])
def test_the_cap_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch, given: str, code: int) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(serve, "supervise", lambda command: commands.append(command) or 0)
    result = CliRunner().invoke(app, ["serve", "--max-request-bytes", given, "model"])
    assert result.exit_code == code
    assert [command[3:5] for command in commands] == ([["--max-request-bytes", "1000"]] if not code else [])


def test_a_cap_of_the_environment_is_checked_at_the_start(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSESERVE_MAX_REQUEST_BYTES", "32M")
    with pytest.raises(ConfigError, match="SPARSESERVE_MAX_REQUEST_BYTES = 32M .*whole number"):
        start(models["llama"])


def test_a_server_without_our_front_is_refused(models: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="--grpc = True is refused.*no keys"):
        start(models["llama"], "--grpc")


def test_contexts_in_which_the_policy_never_acts_are_refused(models: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="--max-model-len = 512 is refused.*more than 1024"):
        start(models["llama"], "--max-model-len", "512")
    assert start(models["llama"], "--max-model-len", "512", policy="dense", sets=()).description


@pytest.mark.parametrize("folder", ["missing", "file"])
@pytest.mark.parametrize(
    ("name", "flags", "refused"),
    [
        ("PROMETHEUS_MULTIPROC_DIR", [], True),
        ("PROMETHEUS_MULTIPROC_DIR", ["--api-server-count", "2"], True),
        ("TMPDIR", ["--api-server-count", "2"], True),
        ("TMPDIR", [], False),
    ],
)
def test_a_folder_for_metrics_that_cannot_be_written_is_refused(
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    name: str,
    flags: list[str],
    refused: bool,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / folder))
    if not refused:
        assert start(models["llama"], *flags).description
        return
    with pytest.raises(ConfigError, match=f"{name} = {tmp_path / folder} .*can be written.*unset {name}"):
        start(models["llama"], *flags)
