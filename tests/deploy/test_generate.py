"""What `make generate` writes is what is committed, and only text between the marks of a document changes."""

from __future__ import annotations

import pytest

from deploy import generate
from deploy.generate import generated
from tests.helpers.deploy.observability import FOLDER


def test_generated_files_are_up_to_date() -> None:
    files = generated()
    assert [str(path) for path, text in files.items() if path.read_text() != text] == [], "run make generate"
    assert {path for path in files if path.parent.name == "grafana"} == {*(FOLDER / "grafana").iterdir()}


def test_a_table_goes_between_its_marks_alone() -> None:
    text = "a\n<!-- choices: begin, from make generate -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    assert generate.between_marks(text, "choices", "new\n") == text.replace("old", "new")


def test_a_document_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="policies: begin"):
        generate.readme("no marks")
