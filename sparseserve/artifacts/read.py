"""Reading files that anyone may have written: bounded, strict, and ArtifactError for whatever is wrong."""

from __future__ import annotations

import json
import reprlib
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from sparseserve.errors import ArtifactError, Problem

T = TypeVar("T")

MAX_TEXT_BYTES = 128 << 20  # the largest published Retrieval_Head file has about 10 MB
MAX_TENSOR_BYTES = 4 << 30  # the largest published gates have 0.5 GB
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_TOKENS = 2**31 - 1
SHOWN_ERRORS = 5
FROM_ITS_AUTHORS = "take the file again from where its authors publish it"

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Row = Annotated[list[Number], Field(min_length=1, max_length=MAX_HEADS)]
Rows = Annotated[list[Row], Field(min_length=1, max_length=MAX_LAYERS)]  # [L][heads]
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)]
Index = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,2})$")]  # of a layer or a head, as a JSON key


def refuse(where: Path | str, found: str, value: object, accepted: str, remedy: str = FROM_ITS_AUTHORS) -> NoReturn:
    """Raise ArtifactError: in which file, what was found, what is accepted and what to do."""
    raise ArtifactError(Problem(found, _short(value), accepted, remedy=remedy, where=str(where))) from None


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """All bytes of a file of at most `limit` bytes."""
    try:
        check_size(path, limit)
        return path.read_bytes()
    except OSError as error:
        refuse(path, "file", error.strerror, "a file that can be read", "check the path and its permissions")


def check_size(path: Path, limit: int) -> int:
    """Bytes of a regular file that exists and has at most `limit` of them."""
    if not path.is_file():
        refuse(path, "file", "no file of that name", "a file that can be read", "check the path")
    if (size := path.stat().st_size) > limit:
        refuse(path, "size", f"{size} bytes", f"at most {limit} bytes")
    return size


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        refuse(path, "text", f"a byte at {error.start} that is not UTF-8", "UTF-8 text")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return parse_json(read_text(path), path)


def parse_json(text: str, where: Path | str) -> Any:
    """Standard JSON: no NaN, no infinity, no key twice, no half surrogates; Python's own reader takes them all."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        refuse(where, "JSON", "nested too deeply", "JSON as its authors write it")
    except ValueError as error:
        refuse(where, "JSON", error, "standard JSON, every key once")


def parse(adapter: TypeAdapter[T], value: Any, where: Path | str, accepted: str) -> T:
    """`value` as the adapter's type."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [
            Problem(_place(found["loc"]), _short(found["input"]), f"{accepted}: {found['msg']}", where=str(where))
            for found in details[:SHOWN_ERRORS]
        ]
        more = [f"{where}: and {len(details) - SHOWN_ERRORS} more."] if len(details) > SHOWN_ERRORS else []
        raise ArtifactError(*problems, *more) from None


def rectangle(rows: list[list[float]], where: Path | str, name: str) -> tuple[int, int]:
    """Rows and columns of a table whose rows are equally long."""
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            refuse(where, f"{name}[{index}]", f"{len(row)} values", f"{len(rows[0])} values, as {name}[0] has")
    return len(rows), len(rows[0])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{_short(key)} is written twice")
        for text in (key, value):
            if isinstance(text, str):
                text.encode()  # half a surrogate pair is a ValueError now, not when it is written
        result[key] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{_short(text)} is too large for a number")
    return value


def _place(loc: tuple[int | str, ...]) -> str:
    head, *rest = loc or ("content",)
    return str(head) + "".join(f"[{key}]" for key in rest)


def _short(value: object) -> str:
    try:
        text = reprlib.repr(value) if isinstance(value, list | tuple | dict | set) else str(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
