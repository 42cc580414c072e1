"""The GPU benchmark without a GPU: its byte model, its report, and its contenders and checks in the simulator."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.bench.gpu import byte_model, layer_times, vllm_times
from kernels.bench.gpu.baselines import MAKERS, baselines
from kernels.bench.gpu.contenders import contenders
from kernels.bench.gpu.layers import LLAMA_8B, TIDAL, Layers, Point
from kernels.bench.gpu.report import compare, document, entries, report
from kernels.bench.gpu.timing import Contender, Outcome, measure
from kernels.bench.gpu.vllm_times import BUDGET, TOKENS, Timing
from sparseserve import ops
from sparseserve.testing import target
from sparseserve.testing.target import Layout
from sparseserve.types import HeadShape

SMALL = HeadShape(kv_heads=2, queries_per_kv=2, head_dim=64)
MILLISECOND = 1e-3


class Clock:
    """A device that runs at once and takes a millisecond for everything."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def seconds(self, replay: Callable[[], None]) -> float:
        return MILLISECOND


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.bench.gpu.timing.LEAST_CALLS", 1)


@pytest.fixture
def simulated() -> Iterator[None]:
    if not target.has_simulator():
        pytest.skip(target.NO_SIMULATOR)
    with target.simulated(Layout.LBHNC):
        yield


def small_layers(page_size: int = 64, token_first: bool = False) -> Layers:
    """Two layers of two rows of 256 tokens."""
    point = Point(256, 2, page_size, budget=128)
    l2_bytes = 2048 if page_size == 64 else 32768
    layers = Layers(point, SMALL, token_first, torch.device("cpu"), l2_bytes)
    assert layers.count == 2 if page_size == 64 else layers.count == 1
    return layers


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        (byte_model.attend(LLAMA_8B, 1, 4096), 16_777_216),  # the 17 MB of the target
        (byte_model.attend(LLAMA_8B, 1, 32768), 134_217_728),
        (byte_model.attend(LLAMA_8B, 8, 2048), 67_108_864),
        (byte_model.score_pages(LLAMA_8B, 1, 1024), 1024 * 8 * 512 + 1024 * 8 * 4),
        (byte_model.score_gates(LLAMA_8B, 1, 512), 2_097_152 + 512 * 8 * 512 + 512 * 8 * 4),
        (byte_model.score_tokens(LLAMA_8B, 1, 32768), 67_108_864 + 1_048_576),
        (byte_model.select(LLAMA_8B, 1, 1024, 61), 8 * 4 * 1085),
        (byte_model.summarize_pages(LLAMA_8B, 4, 32), 4 * 8 * 34 * 256),
    ],
)
def test_bytes_by_hand(moved: int, expected: int) -> None:
    assert moved == expected


def test_floor_is_that_of_the_roofline() -> None:
    dense = byte_model.attend(LLAMA_8B, 1, 32768)
    assert byte_model.floor_microseconds((dense,)) == pytest.approx(34.68, abs=0.01)  # 134 MB at 3.87 TB/s
    assert byte_model.floor_microseconds((4_194_304, 32_768, 8_388_608)) == 7.5  # three launches


def test_points_are_whole_pages() -> None:
    assert layer_times.shape("131072x4") == (131072, 4)
    for wrong in ("4096", "100x1", "x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="64 tokens"):
            layer_times.shape(wrong)


@pytest.mark.parametrize("token_first", [False, True])
def test_our_contenders_are_right_in_the_simulator(simulated: None, token_first: bool) -> None:
    layers = small_layers(token_first=token_first)
    outcomes = measure(contenders(layers, 2048), layers.count, Clock(), rounds=3)
    assert {name: outcome.note for name, outcome in outcomes.items()} == dict.fromkeys(outcomes, "")
    for name in ("tidal reuse layer", "quest layer", "seer layer", "quest score + select", "seer score + select"):
        assert outcomes[name].seconds == [MILLISECOND / layers.count] * 3
    assert len(outcomes["quest layer"].kernels) == 2


def test_small_pages_leave_out_what_does_not_fit(simulated: None) -> None:
    layers = small_layers(page_size=16)
    outcomes = measure(contenders(layers, 32768), layers.count, Clock(), rounds=1)
    assert not any(outcome.note for outcome in outcomes.values())
    assert not {"quest layer", "seer layer", "summarize_pages"} & set(outcomes)


def test_the_selection_is_random_and_within_the_budget() -> None:
    layers = small_layers()
    selection = layers.random_selection(TIDAL)
    assert selection.units.shape == (2, 2, 127)
    assert all(len(set(units)) == 127 and units == sorted(units) for units in selection.units.flatten(0, 1).tolist())
    assert not torch.equal(selection.units[0, 0], selection.units[1, 1])
    assert sorted(layers.pages.flatten().tolist()) == list(range(8)) != layers.pages.flatten().tolist()


@pytest.mark.parametrize("wrong_in", ["attend", "score_pages", "selection", "summarize_pages", "score_gates"])
def test_a_wrong_kernel_has_no_time(simulated: None, wrong_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = "score_pages" if wrong_in == "selection" else wrong_in
    right = getattr(ops, op)

    def nearly(*arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        if op == "attend":
            options["out"].mul_(1.02)
        elif wrong_in == "selection":
            arguments[6].selection.units.add_(1)
        elif op == "summarize_pages":
            arguments[2].mul_(1.02)
        else:
            result.mul_(1.02)
        return result

    monkeypatch.setattr(ops, op, nearly)
    layers = small_layers()
    outcomes = measure(contenders(layers, 2048), layers.count, Clock(), rounds=1)
    wrong = {name for name, outcome in outcomes.items() if outcome.note.startswith("wrong: ")}
    assert not any(outcomes[name].seconds for name in wrong)
    named = {
        "attend": {"attend everything", "tidal reuse layer", "quest layer"},
        "score_pages": {"quest score + select", "quest layer"},
        "selection": {"quest score + select", "quest layer"},
        "summarize_pages": {"summarize_pages"},
        "score_gates": {"seer score + select", "seer layer"},
    }
    assert named[wrong_in] <= wrong and "copy of a dense layer" not in wrong


def fake(kernels: tuple[int, ...] = (8,), check: Callable[[], None] = lambda: None) -> Contender:
    """One that writes a number."""
    result = torch.zeros(1)
    return Contender(kernels, lambda i: result.fill_(7), (result,), check)


def test_what_fails_says_why_and_the_others_are_timed() -> None:
    def missing() -> Contender:
        raise ImportError("No module named 'other'")

    def broken() -> Contender:
        raise RuntimeError("nvcc")

    def differs() -> None:
        raise AssertionError("error 1 exceeds 0.1")

    class Stale(Clock):
        def capture(self, run: Callable[[], None]) -> Callable[[], None]:
            return lambda: None

    builders = {"ours": fake, "missing": missing, "broken": broken, "wrong": lambda: fake(check=differs)}
    outcomes = measure(builders, 1, Clock(), rounds=2)
    assert outcomes["ours"].seconds == [MILLISECOND] * 2
    assert [outcomes[name].note for name in ("missing", "broken", "wrong")] == [
        "not there: No module named 'other'",
        "failed: RuntimeError: nvcc",
        "wrong: error 1 exceeds 0.1",
    ]
    assert not any(outcomes[name].seconds for name in ("missing", "broken", "wrong"))
    assert measure({"ours": fake}, 1, Stale(), 1)["ours"].note.startswith("wrong: a replay of the graph")


def test_what_a_graph_works_on_outlives_it() -> None:
    class Graph(Clock):
        """Knows addresses only, as a CUDA graph does."""

        def capture(self, run: Callable[[], None]) -> Callable[[], None]:
            memory = results[-1]

            def replay() -> None:
                result = memory()
                assert result is not None
                result.fill_(7)

            return replay

        def seconds(self, replay: Callable[[], None]) -> float:
            gc.collect()
            replay()
            return MILLISECOND

    results: list[weakref.ref[torch.Tensor]] = []

    def build() -> Contender:
        contender = fake()
        results.append(weakref.ref(contender.results[0]))
        return contender

    outcomes = measure({"one": build, "two": build}, 1, Graph(), rounds=2)
    assert all(len(outcome.seconds) == 2 for outcome in outcomes.values())


def test_baselines_that_cannot_be_imported_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vllm.vllm_flash_attn", "flash_attn_interface", "flashinfer", "flashinfer.decode"):
        monkeypatch.setitem(sys.modules, module, None)
    layers = small_layers()
    outcomes = measure(baselines(layers), layers.count, Clock(), rounds=1)
    assert set(outcomes) == set(MAKERS)
    assert all(outcome.note.startswith("not there: ") for outcome in outcomes.values())


def test_report() -> None:
    point, other = Point(32768, 1, 64), Point(4096, 1, 64)
    dense, sparse = 134_217_728, 8_388_608
    run = entries(
        point,
        {
            "copy of a dense layer": Outcome((2 * dense,), [65e-6, 60e-6, 64e-6]),  # 4194 GB/s
            "attend everything": Outcome((dense,), [40e-6]),
            "tidal reuse layer": Outcome((sparse,), [5e-6]),
            "quest layer": Outcome((sparse,), note="wrong: error 1 exceeds 0.1"),
            "FlashAttention-3": Outcome((dense,), [50e-6]),
            "FlashInfer decode": Outcome((dense,), [60e-6]),
            "XQA": Outcome(note="not there: No module named 'flashinfer'"),
        },
    ) + entries(other, {"attend everything": Outcome((16_777_216,), [8e-6])})
    compare(run)
    numbers = {(entry.contender, entry.context): entry for entry in run}
    copy, reuse = numbers["copy of a dense layer", 32768], numbers["tidal reuse layer", 32768]
    assert (copy.microseconds, copy.best_microseconds) == pytest.approx((64, 60))
    assert copy.gigabytes_per_second == pytest.approx(4194.3, abs=0.1) and copy.share_of_copy == 1
    assert numbers["attend everything", 32768].share_of_copy == pytest.approx(0.8)
    assert numbers["attend everything", 4096].share_of_copy == pytest.approx(0.5)
    assert reuse.speedup == pytest.approx(10) and reuse.over_floor == pytest.approx(2)
    assert numbers["attend everything", 4096].speedup is None  # no baseline at that point
    assert numbers["quest layer", 32768].microseconds is None
    lines = report(run).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "quest layer: wrong: error 1 exceeds 0.1",
        "XQA: not there: No module named 'flashinfer'",
        "",
        "pages of 64 32k x 1 4k x 1",
        "copy of a dense layer 64.0 100% 0.92f",
        "attend everything 40.0 80% 1.25x 1.15f 8.0 50% 1.85f",
        "tidal reuse layer 5.0 40% 10.00x 2.00f",
        "quest layer wrong",
        "FlashAttention-3 50.0 64% 1.00x 1.44f",
        "FlashInfer decode 60.0 53% 0.83x 1.73f",
        "XQA not there",
        "",
        "us a layer, share of the fastest copy, fastest dense attention of others / this, this / floor",
    ]
    written = json.loads(json.dumps(document("abc", run, layout="LBHNC")))
    assert written["commit"] == "abc" and written["layout"] == "LBHNC" and written["torch"] == torch.__version__
    assert [entry["note"] for entry in written["entries"] if entry["contender"] == "XQA"] == [
        "not there: No module named 'flashinfer'"
    ]
    assert {"date", "gpu", "driver", "cuda", "definitions"} <= set(written)


def test_prompts_continue_shorter_ones_and_differ_by_row() -> None:
    assert vllm_times.prompt(1, 64) == vllm_times.prompt(1, 128)[:64] != vllm_times.prompt(2, 64)


@pytest.mark.parametrize(
    ("blocks", "together", "rows", "note"),
    [
        (128, TOKENS, 10, ""),
        (128, TOKENS - 1, 10, "not together: 47 of 48 steps had all rows"),
        (127, TOKENS, 10, "no room: 8192 tokens in a cache of 8128"),
        (128, TOKENS, 0, "inactive: 0 rows under the policy attended to 0 of 0 tokens"),
    ],
)
def test_steps_count_when_all_rows_decode_together_under_the_policy(
    blocks: int, together: int, rows: int, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SimpleNamespace(num_gpu_blocks=blocks, block_size=64)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache)))
    counted = iter([[5.0, 5.0, 5.0], [5 + 32 * rows * 2048.0, 5 + 32 * rows * 4090.0, 5.0 + rows]])
    monkeypatch.setattr(vllm_times, "counters", lambda: next(counted))

    def steps(llm: object, prompts: list[list[int]], tokens: int) -> list[tuple[float, int]]:
        assert [len(prompt) for prompt in prompts] == [4096 - TOKENS] * 2
        return [(9.0, 0), *[(0.5, 2)] * vllm_times.SETTLING, *[(0.02, 2)] * (together - vllm_times.SETTLING), (9.0, 1)]

    monkeypatch.setattr(vllm_times, "steps", steps)
    timing = Timing(4096, 2, "quest")
    vllm_times.measure(llm, timing, rounds=3)
    assert timing.note == note
    numbers = (timing.milliseconds, timing.spread, timing.attended, timing.resident)
    assert numbers == ((None,) * 4 if note else (20.0, 0.0, 2048.0, 4090.0))


def test_vllm_table() -> None:
    timings = [
        Timing(65536, 8, "vllm", milliseconds=24.0),
        Timing(2048, 16, "vllm", milliseconds=6.0),
        Timing(65536, 8, "quest", milliseconds=8.0, attended=5888.0, resident=65512.0),
        Timing(2048, 16, "quest", milliseconds=6.0),
        Timing(65536, 8, "tidal", note="not together: 3 of 48 steps had all rows"),
    ]
    vllm_times.compare(timings)
    assert vllm_times.table(timings).splitlines()[:5] == [
        "tidal at 65536 x 8: not together: 3 of 48 steps had all rows",
        "ms a step          64k x 8         2k x 16",
        "vllm       24.00 1.00x all  6.00 1.00x all",
        "quest      8.00 3.00x 5888  6.00 1.00x all",
        "tidal         not together",
    ]


def test_vllm_is_started_with_our_backend_only_under_a_policy() -> None:
    assert vllm_times.settings("vllm") == {}
    for engine in vllm_times.MEASURED:
        given = vllm_times.settings(engine)
        assert given["attention_config"] == {"backend_per_kind": {"full_attention": "CUSTOM"}}
        policy = given["additional_config"]["sparseserve"]
        assert (policy["policy"], policy["budget_tokens"]) == (engine, BUDGET)
