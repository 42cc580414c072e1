"""Files of torch.save, read without running anything in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseserve.artifacts.read import MAX_TENSOR_BYTES, check_size, refuse

MAGIC = b"PK\x03\x04"
SAVED = "what torch.save writes (torch >= 1.6), with tensors, lists and dicts alone"


def read_pickle(path: Path) -> dict[Any, Any]:
    """The dict in a file of torch.save."""
    size = check_size(path, MAX_TENSOR_BYTES)
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive ends in nearly any exception; a pickle with code in UnpicklingError
        refuse(path, "pickle", str(error).partition("\n")[0], SAVED)
    if not isinstance(content, dict):
        refuse(path, "content", type(content).__name__, "a dict")
    tensors = [value for value in content.values() if isinstance(value, Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
        refuse(path, "tensors", "larger than the file", "tensors that are stored in full")
    return content


def _check_archive(path: Path) -> None:
    """Refuse entries that unpack to more than lies in the file: torch stores, it does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # likewise
        refuse(path, "archive", error, SAVED)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        refuse(path, "archive", "compressed entries", SAVED)
