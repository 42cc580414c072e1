"""Every refusal of the table is provoked, told with its remedy, and printed in the README."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from sparseserve import ops
from sparseserve.errors import UnsupportedError
from sparseserve.plugin.settings import rope_table
from sparseserve.plugin.support.checks import check_worker, cuda_problems
from sparseserve.plugin.support.table import REFUSALS, support_table
from sparseserve.policies import Policy, Quest, Retrieval
from sparseserve.types import HeadShape
from tests.helpers.paths import ROOT
from tests.helpers.plugin.cuda_worker import Worker, stand_in_for_flash_attention, vllm_config
from tests.helpers.plugin.provoking import (
    PIECEWISE,
    Arguments,
    Attention,
    Changed,
    OnCuda,
    Other,
    Room,
    Serve,
    cuda_config,
)

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_models", "environment")]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "sparseserve")
    monkeypatch.setattr(ops, "isa", lambda: "portable")


@pytest.fixture
def room(models: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Room:
    return Room(models, monkeypatch, tmp_path)


def vllms_worker(room: Room) -> None:
    worker = SimpleNamespace(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")
    config: Any = SimpleNamespace(parallel_config=worker)  # nothing else is read
    check_worker(config)


def another_platform(room: Room) -> None:
    room.patch.setattr(type(current_platform), "is_cpu", lambda self: False)
    room.patch.setattr(type(current_platform), "device_name", "rocm")
    Serve()(room)


def units_of_48(room: Room) -> None:
    room.patch.setattr(Quest, "selection_unit", property(lambda policy: 48))  # as gates may have
    OnCuda({"page": 48})(room)


def compensation(room: Room) -> None:
    (heads := room.folder / "heads.json").write_text('{"0": [0], "1": [], "2": []}')
    stand_in_for_flash_attention(room.patch)
    policy = Retrieval(artifact=str(heads), compensate=True, kv_memory="shared")
    Worker(vllm_config(room.folder), policy, patch=room.patch)


def rope(config: Any, policy: Policy) -> None:
    rope_table(config, 64)


@dataclass(frozen=True)
class Case:
    """A refusal, how it is provoked, and what is told; `cure` is what its remedy comes to."""

    feature: str
    provoke: Serve | Arguments | Changed | OnCuda | Attention | Other
    told: tuple[str, ...]
    cure: Serve | None = None


NGRAM = '{"method": "ngram", "num_speculative_tokens": 3}'
CONNECTOR = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'
SHARED = ("kv_memory=shared",)
SMALL = ("budget_tokens=512", "min_tokens=512")
HYBRID = "--disable-hybrid-kv-cache-manager"
LAYOUT = {"VLLM_KV_CACHE_LAYOUT": "LBNHC"}
POISON: dict[str, object] = {"sparseserve.plugin.head_memory.poison.ENABLED": True}
ISA: dict[str, object] = {"vllm.v1.attention.backends.cpu_attn._get_attn_isa": lambda *_: "neon"}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ROPE = "model_config.hf_text_config.rope_parameters"
CAPPED = "model_config.hf_text_config.attn_logit_softcapping"
OTHERS_BACKEND = "another attention backend"
OTHERS_ATTENTION = "layers whose attention is another than config.json says"

CASES = [
    Case("the gRPC server", Serve(("--grpc",)), ("--grpc = True is refused", "no keys")),
    Case(
        "one API server before several engines",
        Serve(("-dp", "2", "--api-server-count", "1")),
        ("--api-server-count = 1", "2 or more", "drop it"),
    ),
    Case(
        "settings of a policy beside --policy",
        Serve(("--additional-config.sparseserve.policy", "dense")),
        ("--additional-config sparseserve", "--policy"),
    ),
    Case("another worker", Serve(("--worker-cls", "a.B")), ("--worker-cls = a.B", "SparseCPUWorker", "drop")),
    *(
        Case(OTHERS_BACKEND, Arguments((flag, "TRITON_ATTN")), ("TRITON_ATTN ", "backend of its own"))
        for flag in (
            "--attention-backend",
            "--attention-config.backend",
            "--attention-config.backend_per_kind.full_attention",
        )
    ),
    Case("vLLM's own worker under our settings", Other(vllms_worker, "worker"), ("CPUWorker", "sparseserve serve")),
    Case("pooling models", Serve(model="encoder"), ("--runner = pooling", "generate")),
    Case("MLA", Serve(model="mla"), ("mla (MLA)", "separate keys and values", "vLLM itself")),
    Case(
        "encoders, and layers without attention",
        Serve(model="mamba"),
        ("mamba (attention free)", "decoder-only attention", "vLLM itself"),
    ),
    Case(
        "sliding windows and hybrid models",
        Serve(model="sliding"),
        ("sliding window of 1024 tokens", "full attention", "--disable-sliding-window"),
        cure=Serve(("--disable-sliding-window",), "sliding", sets=SMALL),
    ),
    Case(
        "sliding windows and hybrid models",
        Serve(model="interleaved"),
        ("sliding_attention", "full attention", "--disable-sliding-window"),
    ),
    Case("ALiBi, capped logits", Changed({CAPPED: 30.0}), ("(ALiBi or capped logits)", "plain softmax attention")),
    Case(OTHERS_ATTENTION, Attention({"sliding_window": (511, 0)}), ("layers.3.attn = sliding window is",)),
    Case(OTHERS_ATTENTION, Attention({"alibi_slopes": [1.0]}), ("layers.3.attn = ALiBi is",)),
    Case(OTHERS_ATTENTION, Attention({"logits_soft_cap": 30.0}), ("layers.3.attn = capped logits is",)),
    Case(
        OTHERS_ATTENTION,
        Attention({"sinks": [1.0], "kv_cache_dtype": "fp8"}),
        ("layers.3.attn = attention sinks and quantized KV cache is",),
    ),
    Case(
        "gates in a model without rotary embedding",
        Changed({ROPE: None}, rope, "worker"),
        ("rotary position embedding",),
    ),
    Case(
        "gates under partial or interleaved rotations",
        Changed({ROPE: PARTIAL}, rope, "worker"),
        ("'partial_rotary_factor': 0.5", "the whole head"),
    ),
    Case("heads of other sizes", Serve(model="odd-head-size"), ("head size = 112", "32, 64, 80, 96, 128, 256")),
    Case(
        "layers with unlike heads",
        Changed({"model_config.model_arch_config.per_layer_overrides": {3: {}}}),
        ("the same heads in every layer",),
    ),
    Case(
        "speculative decoding",
        Serve(("--speculative-config", NGRAM)),
        ("--speculative-config = ngram", "drop --speculative-config"),
    ),
    Case(
        "speculative decoding",
        OnCuda({"speculative": SimpleNamespace(method="ngram")}),
        ("--speculative-config = ngram",),
    ),
    Case(
        "KV connectors",
        Serve(("--kv-transfer-config", CONNECTOR)),
        ("--kv-transfer-config = ExampleConnector", "drop --kv-transfer-config"),
    ),
    Case(
        "KV offloading",
        Serve(("--kv-offloading-size", "1")),
        ("--kv-offloading-size = OffloadingConnector", "drop --kv-offloading-size"),
    ),
    Case(
        "context parallelism in decode",
        Changed({"parallel_config.decode_context_parallel_size": 2}),
        ("--decode-context-parallel-size = set", "drop --decode"),
    ),
    Case(
        "context parallelism in prompts",
        Changed({"parallel_config.prefill_context_parallel_size": 2}),
        ("--prefill-context-parallel-size = set", "drop --prefill"),
    ),
    Case("other platforms", Other(another_platform, "launch"), ("platform = rocm", "sparseserve[cuda]")),
    Case("the Rust front end", Serve(env={"VLLM_USE_RUST_FRONTEND": "1"}), ("unset VLLM_USE_RUST_FRONTEND",)),
    Case(
        "contexts in which the policy never acts",
        Serve(("--max-model-len", "512"), sets=("budget_tokens=512",)),
        ("--max-model-len = 512 is refused", "more than 1024"),
        cure=Serve(("--max-model-len", "512"), policy="dense"),
    ),
    Case(
        "a KV cache of another dtype, such as fp8",
        Serve(("--kv-cache-dtype", "fp8")),
        ("--kv-cache-dtype = fp8", "auto or bfloat16"),
    ),
    Case(
        "pages that split units",
        Serve(("--block-size", "48")),
        ("--block-size = 48", "multiple of 32", "--block-size 64"),
    ),
    Case(
        "pages that split units",
        OnCuda({"page": 16}),
        ("--block-size = 16", "multiple of 32", "give --block-size 32"),
    ),
    Case("CPUs other than x86-64", Serve(patches=ISA), ("CPU attention ISA = neon", "vec, vec16, amx")),
    Case("fp32", OnCuda({"dtype": torch.float32}), ("--dtype = float32", "bfloat16 or float16", "give --dtype")),
    Case("heads of other sizes on CUDA", OnCuda(heads=HeadShape(2, 2, 80)), ("head size = 80", "64, 96, 128, 256")),
    Case(
        "many query heads that share a KV head",
        OnCuda(heads=HeadShape(1, 32, 128)),
        ("query heads of a KV head = 32", "at most 16"),
    ),
    Case(
        "units that CUDA cannot halve",
        Other(units_of_48, "worker"),
        ("tokens of a unit = 48 is refused. Expected: a power of two",),
    ),
    Case(
        "policies that wait for the host",
        Other(compensation, "worker"),
        ("compensate = True ", "--set compensate=false"),
    ),
    Case("dual batch overlap", OnCuda({"ubatching": True}), ("--enable-dbo", "drop")),
    Case(
        "graphs that write keys and values", OnCuda({"compilation": PIECEWISE}), ("splitting_ops", "KV cache updates")
    ),
    Case(
        "pipeline parallelism with memory of heads",
        Serve(("-pp", "2"), policy="streaming"),
        ("--pipeline-parallel-size = 2", "per_head", "drop it", "--set kv_memory=shared"),
        cure=Serve(("-pp", "2"), policy="streaming", sets=SHARED),
    ),
    Case(
        "one kind of pages with memory of heads",
        Serve((HYBRID,), policy="streaming"),
        (f"{HYBRID} = true", "per_head", "drop it", "--set kv_memory=shared"),
        cure=Serve((HYBRID,), policy="streaming", sets=SHARED),
    ),
    Case(
        "prefixes that are thinned out with memory of heads",
        Serve(("--prefix-cache-retention-interval", "256"), policy="streaming"),
        ("--prefix-cache-retention-interval = 256 ", "per_head", " drop it"),
    ),
    Case(
        "other layouts with memory of heads",
        Serve(policy="streaming", env=LAYOUT),
        ("VLLM_KV_CACHE_LAYOUT = LBNHC", "BLHNC", "unset it", "--set kv_memory=shared"),
        cure=Serve(policy="streaming", sets=SHARED, env=LAYOUT),
    ),
    Case(
        "poison in another process",
        Serve(policy="streaming", patches=POISON),
        ("SPARSESERVE_POISON_FREED_PAGES", "VLLM_ENABLE_V1_MULTIPROCESSING=0"),
    ),
    Case(
        "reuse across pipeline stages",
        Serve(("-pp", "2"), policy="tidal", sets=("reselect_layer=4",)),
        ("--pipeline-parallel-size = 2 ", "quest"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.feature}: {case.provoke.who}")
def test_a_refusal_is_told_with_what_is_allowed_and_its_remedy(case: Case, room: Room) -> None:
    (refusal,) = (refusal for refusal in REFUSALS if refusal.feature == case.feature)
    with pytest.raises(UnsupportedError) as error:
        case.provoke(room)
    allowed = refusal.allowed or f"one of {', '.join(refusal.choices)}"
    parts = f"{refusal.key} = ", " is refused. Expected: ", f"{allowed}.", f" Remedy: {refusal.remedy}."
    assert re.fullmatch(".*".join(map(with_gaps, parts)), str(error.value)), error.value
    assert [words for words in case.told if words not in str(error.value)] == []
    assert refusal.where in ("both", case.provoke.who)
    if case.cure:
        cured = case.cure(room)
        assert cured.description and cured.args.model == room.models[case.cure.model]


def with_gaps(text: str) -> str:
    """A text of a refusal as a pattern: of one line, with anything in its gaps."""
    return re.sub(r"\\{\w+\\}", ".+", re.escape(text))


def test_every_refusal_is_provoked() -> None:
    features = [refusal.feature for refusal in REFUSALS]
    assert len({*features}) == len(features)
    assert {*features} == {case.feature for case in CASES}
    assert all((refusal.allowed or refusal.choices) and refusal.remedy for refusal in REFUSALS)


def test_all_obstacles_are_told_at_once(room: Room) -> None:
    provoke = Serve(("--kv-cache-dtype", "fp8"), "odd-head-size", env={"VLLM_USE_RUST_FRONTEND": "1"})
    with pytest.raises(UnsupportedError) as error:
        provoke(room)
    for told in ("head size = 112", "unset VLLM_USE_RUST_FRONTEND", "--kv-cache-dtype = fp8"):
        assert told in str(error.value)


def test_pages_of_many_heads_may_lie_as_they_do(room: Room) -> None:
    assert Serve(policy="streaming", env={"VLLM_KV_CACHE_LAYOUT": "BLHNC"})(room).description


def test_what_cuda_can_do_is_not_refused(room: Room) -> None:
    assert not [*cuda_problems(cuda_config(), Quest(), HeadShape(2, 16, 64))]
    Attention()(room)


def test_the_readme_has_the_table() -> None:
    begin, end = "<!-- support: begin, from make generate -->\n", "<!-- end -->"
    printed = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0]
    assert printed == support_table()


def test_the_table_needs_no_vllm() -> None:
    program = "import sys; sys.modules['vllm'] = None; import sparseserve.plugin.support.table"
    subprocess.run([sys.executable, "-c", program], check=True)
