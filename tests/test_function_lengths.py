"""Functions stay short."""

from pathlib import Path
from statistics import median

from tests.function_lengths import Function, functions, ninth_decile


def test_functions_stay_short() -> None:
    found = functions()
    lines = [function.lines for function in found]
    assert median(lines) <= 7
    assert ninth_decile(lines) <= 20
    assert [function for function in found if function.lines > 60] == []


def test_signature_and_body_count_without_decorators(tmp_path: Path) -> None:
    source = "@cache\ndef f(\n    x,\n):\n    return x\n\n\nclass C:\n    async def g(self): ...\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "module.py").write_text(source)
    assert functions(tmp_path, ["code"]) == [Function(4, "f", "code/module.py:2"), Function(1, "g", "code/module.py:9")]
