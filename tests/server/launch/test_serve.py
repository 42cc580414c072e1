"""`sparseserve serve` before the engine starts: what is refused, what is asked of vLLM."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from sparseserve import ops
from sparseserve.config import find_policy, from_dict
from sparseserve.errors import ConfigError, SparseServeError, UnsupportedError
from sparseserve.ops.library import kernels
from sparseserve.policies import Quest
from sparseserve.server.launch import serve as launch
from sparseserve.server.launch.serve import Launch, allowed_plugins, main, prepare, ranges

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "sparseserve")
    monkeypatch.setattr(ops, "isa", lambda: "portable")  # whether kernels are built has a test of its own


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_PLUGINS", "sparseserve")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.endswith("_C_cpu") else find(name))
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def start(model: str, *flags: str, policy: str = "quest", sets: tuple[str, ...] = ()) -> Launch:
    return prepare(find_policy(policy, sets, {}), [model, "--skip-tokenizer-init", *flags])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("mla", ["mla (MLA)", "separate keys and values", "vLLM itself"]),
        ("mamba", ["mamba (attention free)", "decoder-only attention", "vLLM itself"]),
        ("encoder", ["--runner = pooling", "generate"]),
        ("odd-head-size", ["head size = 112", "32, 64, 80, 96, 128, 256"]),
        ("sliding", ["sliding window of 1024 tokens", "full attention", "--disable-sliding-window"]),
        ("interleaved", ["sliding_attention", "full attention", "--disable-sliding-window"]),
    ],
)
def test_models_without_ordinary_attention_are_refused(models: dict[str, str], model: str, told: list[str]) -> None:
    with pytest.raises(UnsupportedError) as error:
        start(models[model])
    assert [words for words in told if words not in str(error.value)] == []


def test_the_remedy_for_sliding_windows_works(models: dict[str, str]) -> None:
    started = start(models["sliding"], "--disable-sliding-window", sets=("budget_tokens=512", "min_tokens=512"))
    assert started.args.model == models["sliding"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--kv-cache-dtype", "fp8"], ["--kv-cache-dtype = fp8", "auto or bfloat16"]),
        (["--block-size", "48"], ["--block-size = 48", "multiple of 32", "--block-size 64"]),
        (["--worker-cls", "a.B"], ["--worker-cls = a.B", "SparseCPUWorker", "drop"]),
        (["--additional-config.sparseserve.policy", "dense"], ["--additional-config sparseserve", "--policy"]),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
            ["--speculative-config = ngram", "drop --speculative-config"],
        ),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            ["--kv-transfer-config = ExampleConnector", "drop --kv-transfer-config"],
        ),
        (["-dp", "2", "--api-server-count", "1"], ["--api-server-count = 1", "2 or more", "drop it"]),
        (["--kv-offloading-size", "1"], ["--kv-offloading-size = OffloadingConnector", "drop --kv-offloading-size"]),
    ],
)
def test_flags_that_cannot_be_combined_are_named(models: dict[str, str], flags: list[str], told: list[str]) -> None:
    with pytest.raises(SparseServeError) as error:
        start(models["llama"], *flags)
    assert [words for words in told if words not in str(error.value)] == []


def test_all_obstacles_are_told_at_once(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedError) as error:
        start(models["odd-head-size"], "--kv-cache-dtype", "fp8")
    for told in ("head size = 112", "unset VLLM_USE_RUST_FRONTEND", "--kv-cache-dtype = fp8"):
        assert told in str(error.value)


def test_reuse_across_pipeline_stages_is_refused(models: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="--pipeline-parallel-size = 2 .*quest"):
        start(models["llama"], "-pp", "2", policy="tidal", sets=("reselect_layer=4",))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-pp", "2"], ["--pipeline-parallel-size = 2", "per_head", "drop it"]),
        (["--disable-hybrid-kv-cache-manager"], ["--disable-hybrid-kv-cache-manager = true", "per_head", "drop it"]),
        ([], ["VLLM_KV_CACHE_LAYOUT = LBNHC", "BLHNC", "unset it"]),
    ],
)
def test_what_keeps_heads_from_freeing_pages_is_refused(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, flags: list[str], told: list[str]
) -> None:
    if not flags:
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    with pytest.raises(UnsupportedError) as error:
        start(models["llama"], *flags, policy="streaming")
    assert [words for words in [*told, "--set kv_memory=shared"] if words not in str(error.value)] == []
    assert start(models["llama"], *flags, policy="streaming", sets=("kv_memory=shared",)).description


def test_prefixes_of_windows_are_not_thinned_out(models: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="--prefix-cache-retention-interval = 256 .*per_head.* drop it"):
        start(models["llama"], "--prefix-cache-retention-interval", "256", policy="streaming")


def test_poison_needs_scheduler_and_worker_in_one_process(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseserve.plugin.head_memory.poison.ENABLED", True)
    with pytest.raises(UnsupportedError, match="SPARSESERVE_POISON_FREED_PAGES.*VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        start(models["llama"], policy="streaming")


def test_pages_of_many_heads_may_lie_as_they_do(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    assert start(models["llama"], policy="streaming").description


@pytest.mark.parametrize(
    ("policy", "sets", "told"),
    [
        ("tidal", ("reselect_layer=40",), ["--set: reselect_layer = 40", "2 to 5", "6 layers"]),
        ("tidal", ("reselect_layer=1",), ["reselect_layer = 1", "2 to 5"]),
        ("quest", ("dense_layers=7",), ["--set: dense_layers", "6 layers"]),
    ],
)
def test_layers_outside_the_model_are_refused(
    models: dict[str, str], policy: str, sets: tuple[str, ...], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        start(models["llama"], policy=policy, sets=sets)
    assert [words for words in told if words not in str(error.value)] == []


def test_wrong_flags_of_vllm_give_its_own_error(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        start(models["llama"], "--bogus", "3")
    assert "vllm: error: unrecognized arguments: --bogus 3" in capsys.readouterr().err
    with pytest.raises(SparseServeError, match="(?s)vLLM refuses this configuration: .*max_model_len"):
        start(models["llama"], "--max-model-len", "100000")


def test_the_summary_says_what_the_policy_will_do(models: dict[str, str]) -> None:
    summary = start(models["llama"], policy="tidal", sets=("reselect_layer=4", "budget_tokens=2048")).description
    for told in ("policy=tidal", "budget_tokens=2048", "dense 0-1, select 2 4, reuse 3 5", "CPU_ATTN", "runner V1"):
        assert told in summary
    assert "75.0% of the KV cache per step at 8192 tokens" in summary  # (4 layers + 2 layers / 4) / 6
    assert "stores 100.0% of dense attention's (1.00x less)" in summary


@pytest.mark.parametrize(
    ("policy", "sets", "told"),
    [
        # 9 of 64 pages of 128 tokens
        ("streaming", (), "stores 14.1% of dense attention's (7.11x less); rounded windows and empty slots cost 0.0%"),
        ("streaming", ("kv_memory=shared",), "stores 100.0% of dense attention's (1.00x less)"),
        ("quest", (), "stores 103.1% of dense attention's (0.97x less)"),  # two vectors for 32 tokens
    ],
)
def test_the_summary_says_what_rows_store(
    models: dict[str, str], policy: str, sets: tuple[str, ...], told: str
) -> None:
    assert told in start(models["llama"], policy=policy, sets=sets).description


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
    again = launch.parse(words[words.index("--model" if "--model" in words else "serve") + 1 :])
    assert again.additional_config == started.args.additional_config
    assert from_dict(again.additional_config.pop("sparseserve")) == Quest(budget_tokens=512)
    assert again.additional_config == ({"mine": {"a": 1}, "other": 2} if flags else {})
    assert (again.model, again.max_num_seqs) == (models["llama"], 7)
    assert again.worker_cls == "sparseserve.plugin.worker_cpu.SparseCPUWorker"


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


def test_plugins_of_others_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ["sparseserve", "sparseserve_front", "sparseserve_metrics", "sparseserve_routes"]
    installed = {"vllm.general_plugins": "lora", "vllm.endpoint_plugins": "routes", "console_scripts": "tool"}
    points = EntryPoints(EntryPoint(name, "module:function", group) for group, name in installed.items())
    monkeypatch.setattr(launch, "entry_points", lambda **only: points.select(**only) if only else points)
    assert allowed_plugins({}) == [*ours, "lora"]  # endpoint plugins are off unless named
    assert allowed_plugins({"VLLM_PLUGINS": "routes,sparseserve"}) == [*ours, "routes"]
    assert allowed_plugins({"VLLM_PLUGINS": ""}) == ours


def test_layers_are_printed_as_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2 4 6-7"
