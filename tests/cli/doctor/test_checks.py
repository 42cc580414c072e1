"""What `sparseserve doctor` finds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparseserve.cli import app
from sparseserve.cli.doctor import checks
from sparseserve.cli.doctor.seams import Seam

run = CliRunner().invoke


def seams_finding() -> str:
    (found,) = (finding.found for finding in checks.diagnose() if finding.check == "vLLM seams")
    return found


def lines(text: str) -> set[str]:
    """Where our source has this, as doctor names it."""
    root = Path(checks.__file__).parents[3]
    files = [(path.relative_to(root), path.read_text().splitlines()) for path in (root / "sparseserve").rglob("*.py")]
    return {f"{path}:{number}" for path, source in files for number, line in enumerate(source, 1) if text in line}


@pytest.mark.vllm
def test_doctor_finds_what_we_rely_on_in_vllm() -> None:
    findings = {finding.check: finding for finding in checks.diagnose()}
    told, _, names = findings["vLLM seams"].found.partition(" (")
    assert told == "all there"
    assert int(names.removesuffix(" names)")) > 300
    assert findings["vLLM"].status == "ok"
    assert findings["torch"].status == "ok"


@pytest.mark.vllm
def test_doctor_says_what_blocks_and_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = {"vllm.config": ["VllmConfig:gone", "NotThere:field", "NotThere.method"], "vllm.not_there": ["name"]}
    uses = [Seam(module, way, "ours.py:7") for module, ways in broken.items() for way in ways]
    monkeypatch.setattr(checks, "seams", lambda: uses)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    result = run(app, ["doctor"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    for told in (
        "VllmConfig:gone",
        "NotThere:field",
        "NotThere.method",
        "vllm.not_there.name",
        "ours.py:7",
        "torchvision::nms",
        "pip uninstall",
    ):
        assert told in result.output


def test_doctor_blocks_a_vllm_of_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "packages_distributions", dict)
    (finding,) = (finding for finding in checks.diagnose() if finding.check == "vLLM")
    assert finding.status == "blocks" and "unknown version" in finding.found


@pytest.mark.vllm
def test_a_function_that_vllm_lost_is_named_where_we_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import registry

    monkeypatch.delattr(registry, "register_backend")
    (where,) = lines("import AttentionBackendEnum, register_backend")
    assert seams_finding() == f"missing vllm.v1.attention.backends.registry.register_backend ({where})"


@pytest.mark.vllm
def test_a_field_that_vllm_lost_is_named_wherever_we_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    monkeypatch.delattr(CommonAttentionMetadata, "is_prefilling")
    monkeypatch.delitem(CommonAttentionMetadata.__annotations__, "is_prefilling")
    name, _, places = seams_finding().removeprefix("missing ").removesuffix(")").partition(" (")
    assert name == "vllm.v1.attention.backend.CommonAttentionMetadata:is_prefilling"
    assert set(places.split(", ")) == lines("common.is_prefilling")


@pytest.mark.vllm
def test_a_method_that_vllm_lost_is_named_where_ours_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    monkeypatch.delattr(CPUAttentionMetadataBuilder, "build")  # an abstract one remains
    name, _, places = seams_finding().removeprefix("missing ").removesuffix(")").partition(" (")
    assert name == "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.build"
    ours = {where for where in lines("super().build(") if "backends/cpu.py" in where}
    assert set(places.split(", ")) == ours and len(ours) == 4


@pytest.mark.vllm
def test_a_method_that_vllm_would_no_longer_call_is_named_where_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    monkeypatch.delattr(SingleTypeKVCacheManager, "find_longest_cache_hit")
    (where,) = lines("def find_longest_cache_hit")
    name = "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.find_longest_cache_hit"
    assert seams_finding() == f"missing {name} ({where})"


@pytest.mark.vllm
def test_a_class_that_vllm_lost_is_named_without_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched import output

    monkeypatch.delattr(output, "SchedulerOutput")
    name, _, places = seams_finding().removeprefix("missing ").removesuffix(")").partition(" (")
    assert name == "vllm.v1.core.sched.output.SchedulerOutput"
    assert set(places.split(", ")) == lines("import SchedulerOutput")


@pytest.mark.vllm
def test_a_module_that_cannot_be_imported_is_named_with_what_we_import_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", None)
    needed = lines("from vllm.v1.worker.gpu_worker import Worker")
    _, _, told = seams_finding().partition("vllm.v1.worker.gpu_worker.Worker (")
    assert needed and set(told.partition(")")[0].split(", ")) == needed
