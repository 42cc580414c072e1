"""A calibration that is killed goes on where it was; files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseserve.calibration.chunks import Chunks
from sparseserve.errors import CalibrationError, FileError
from sparseserve.files import write_atomically


class Work:
    """Doubles numbers and remembers which; dies at one of them."""

    def __init__(self, dies_at: str = "") -> None:
        self.done: list[str] = []
        self.dies_at = dies_at

    def __call__(self, name: str) -> dict[str, Tensor]:
        if name == self.dies_at:
            raise KeyboardInterrupt
        self.done.append(name)
        return {"twice": torch.tensor([2.0 * int(name)])}


def results(chunks: Chunks, work: Work) -> list[float]:
    return [float(tensors["twice"]) for tensors in chunks.run("double", ["1", "2", "3"], work)]


def test_a_killed_run_loses_only_the_current_chunk(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(KeyboardInterrupt):
        results(Chunks(output, {"seed": 1}), Work(dies_at="3"))
    work = Work()
    chunks = Chunks(output, {"seed": 1})
    assert results(chunks, work) == [2.0, 4.0, 6.0]
    assert work.done == ["3"]
    chunks.clear()
    assert list(tmp_path.iterdir()) == []


def test_finished_chunks_load_by_name_and_are_noted(tmp_path: Path) -> None:
    chunks, notes = Chunks(tmp_path / "out", {}), list[float]()

    def note(tensors: dict[str, Tensor]) -> str:
        notes.append(float(tensors["twice"]))
        return "noted"

    list(chunks.run("double", ["1", "2"], Work(), note))
    assert float(chunks.load("double", "2")["twice"]) == 4.0 and notes == [2.0, 4.0]


def test_other_arguments_start_anew(tmp_path: Path) -> None:
    results(Chunks(tmp_path / "out", {"seed": 1}), Work())
    work = Work()
    results(Chunks(tmp_path / "out", {"seed": 2}), work)
    assert work.done == ["1", "2", "3"]


def test_a_damaged_chunk_is_computed_again(tmp_path: Path) -> None:
    results(Chunks(tmp_path / "out", {}), Work())
    for path in (tmp_path / "out.partial").glob("double-2*"):
        path.write_bytes(path.read_bytes()[:20])
    work = Work()
    assert results(Chunks(tmp_path / "out", {}), work) == [2.0, 4.0, 6.0]
    assert work.done == ["2"]


def test_nan_is_an_error_and_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="loss of text-0 = NaN"):
        list(Chunks(tmp_path / "out", {}).run("text", ["0"], lambda name: {"loss": torch.tensor(torch.nan)}))
    assert not list((tmp_path / "out.partial").iterdir())


def test_a_missing_folder_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="a folder that exists"):
        Chunks(tmp_path / "missing" / "out", {})


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
