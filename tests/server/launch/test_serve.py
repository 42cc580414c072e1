"""`sparseserve serve`: how it starts, how it fails, and the limits that it hands on."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from sparseserve.cli import app, serve
from sparseserve.config import find_policy
from sparseserve.errors import ConfigError
from sparseserve.ops.library import kernels
from sparseserve.server.launch import serve as launch
from sparseserve.server.launch.serve import main, prepare
from sparseserve.server.launch.supervise import SERVER_ENDED

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_PLUGINS", "sparseserve")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.endswith("_C_cpu") else find(name))
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def test_missing_kernels_are_told_before_vllm_is_asked(no_kernels: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policy", "quest", "--", "no-such-model"]) == 2
    assert "pip install --no-build-isolation -e ." in capsys.readouterr().err


def test_errors_have_no_traceback_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policy", "qest", "--", "no-such-model"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'quest'" in error
    assert "Traceback" not in error


def test_a_server_that_ends_by_itself_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "serve", lambda source, argv: None)  # how vLLM ends when its engine died
    assert main(["--policy", "quest", "--", "model"]) == 1


def test_the_cap_on_bodies_reaches_the_api_server_and_the_printed_command(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSESERVE_MAX_REQUEST_BYTES", "1")  # the flag wins
    monkeypatch.setattr("vllm.entrypoints.cli.serve.ServeSubcommand.cmd", lambda args: None)
    flags = ["--policy", "quest", "--max-request-bytes", "1000"]
    assert launch.main([*flags, "--", models["llama"], "--skip-tokenizer-init"]) == SERVER_ENDED
    assert "SPARSESERVE_MAX_REQUEST_BYTES=1000 " in capsys.readouterr().err


@pytest.mark.parametrize(("given", "code"), [("1000", 0), ("0", 2), ("32M", 2)])
def test_the_cap_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch, given: str, code: int) -> None:
    commands: list[list[str]] = []

    def supervise(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(serve, "supervise", supervise)
    result = CliRunner().invoke(app, ["serve", "--max-request-bytes", given, "model"])
    assert result.exit_code == code
    assert [command[3:5] for command in commands] == ([["--max-request-bytes", "1000"]] if not code else [])


def test_a_cap_of_the_environment_is_checked_at_the_start(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSESERVE_MAX_REQUEST_BYTES", "32M")
    with pytest.raises(ConfigError, match="SPARSESERVE_MAX_REQUEST_BYTES = 32M .*whole number"):
        prepare(find_policy("quest", (), {}), [models["llama"], "--skip-tokenizer-init"])
