"""`sparseserve serve`: what is added to the arguments of `vllm serve`, and where the server may write."""

from __future__ import annotations

import shlex
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from sparseserve.config import find_policy, from_dict
from sparseserve.errors import ConfigError, SparseServeError
from sparseserve.policies import Quest
from sparseserve.server.launch import flags as launch
from sparseserve.server.launch.flags import allowed_plugins, cuda_flags, parse
from tests.helpers.server import starting

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]
start = partial(starting.start, sets=("budget_tokens=512",))


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


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--additional-config", '{"mine": {"a": 1}, "other": 2}'],
        ["--additional-config.mine.a", "1", "--additional-config.other", "2"],
    ],
)
def test_the_printed_command_is_the_server_that_runs(models: dict[str, str], flags: list[str]) -> None:
    started = start(models["llama"], *flags, "--max-num-seqs", "7", sets=("budget_tokens=512",))
    words = shlex.split(started.command)
    again = parse(words[words.index("--model" if "--model" in words else "serve") + 1 :])
    assert again.additional_config == started.args.additional_config
    assert from_dict(again.additional_config.pop("sparseserve")) == Quest(budget_tokens=512)
    assert again.additional_config == ({"mine": {"a": 1}, "other": 2} if flags else {})
    assert (again.model, again.max_num_seqs) == (models["llama"], 7)
    assert again.worker_cls == "sparseserve.plugin.worker_cpu.SparseCPUWorker"


def test_wrong_flags_of_vllm_give_its_own_error(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        start(models["llama"], "--bogus", "3")
    assert "vllm: error: unrecognized arguments: --bogus 3" in capsys.readouterr().err
    with pytest.raises(SparseServeError, match="(?s)vLLM refuses this configuration: .*max_model_len"):
        start(models["llama"], "--max-model-len", "100000")


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ([], {}),
        (["--attention-config", '{"flash_attn_version": 3}'], {"flash_attn_version": 3}),
        (["--attention-config.flash_attn_version", "2"], {"flash_attn_version": 2}),
    ],
)
def test_the_launcher_asks_for_our_backend_on_cuda(flags: list[str], given: dict[str, int]) -> None:
    policy = find_policy("quest", (), {}).policy("model")
    args = parse(["model", *flags])
    added = cuda_flags(policy, args)
    again = parse(["model", *flags, *added])
    kinds = again.attention_config.backend_per_kind
    assert {kind: backend.name for kind, backend in kinds.items()} == {"full_attention": "CUSTOM"}
    assert again.attention_config.flash_attn_version == given.get("flash_attn_version")
    assert again.block_size == 64
    assert "--block-size" not in cuda_flags(policy, parse(["model", "--block-size", "128"]))


def test_plugins_of_others_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ["sparseserve", "sparseserve_front", "sparseserve_metrics", "sparseserve_routes"]
    installed = {"vllm.general_plugins": "lora", "vllm.endpoint_plugins": "routes", "console_scripts": "tool"}
    points = EntryPoints(EntryPoint(name, "module:function", group) for group, name in installed.items())
    monkeypatch.setattr(launch, "entry_points", lambda **only: points.select(**only) if only else points)
    assert allowed_plugins({}) == [*ours, "lora"]  # endpoint plugins are off unless named
    assert allowed_plugins({"VLLM_PLUGINS": "routes,sparseserve"}) == [*ours, "routes"]
    assert allowed_plugins({"VLLM_PLUGINS": ""}) == ours
