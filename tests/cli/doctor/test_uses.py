"""What a source is seen to use, kind by kind."""

from __future__ import annotations

import ast

import pytest

from sparseserve.cli.doctor.uses import Uses

TYPED = "from m import C\ndef f(x: C):\n    "


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("import m.sub", {"m.sub "}),
        ("import m.sub\nm.sub.name", {"m.sub ", "m sub.", "m sub.name."}),
        ("import m.sub as s\ns.name", {"m.sub ", "m.sub name."}),
        ("from m import C", {"m C."}),
        ("def f():\n    from m import C", {"m C."}),
        ("if TYPE_CHECKING:\n    from m import C", {"m C."}),
        ("from m import C\nC.member.more", {"m C.", "m C.member.", "m C.member.more."}),
        (TYPED + "x.field.more", {"m C.", "m C:field:", "m C:field:more:"}),
        ("from m import C\ndef f(x: C | None):\n    x.field", {"m C.", "m C:field:"}),
        ("from m import C\ndef f(x: type[C]):\n    x.member", {"m C.", "m C.member."}),
        ("from m import C\ndef f(x: C | int):\n    x.field", {"m C."}),
        ("from m import C\ndef f(x: C):\n    return [x.field for x in []]", {"m C."}),
        ("from m import C\nx: C = make()\nx.field", {"m C.", "m C:field:"}),
        (TYPED + "y = x.field; y.more", {"m C.", "m C:field:", "m C:field:more:"}),
        (TYPED + "y, z = x.a, x.b; z.more", {"m C.", "m C:a:", "m C:b:", "m C:b:more:"}),
        (TYPED + "x = other(); x.field", {"m C."}),
        (TYPED + "x.method().more", {"m C.", "m C:method:", "m C:method:more:"}),
        ("from m import make\nmake().name", {"m make.", "m make:name:"}),
        ("from m import make\nasync def f():\n    (await make()).name", {"m make.", "m make:name:"}),
        ("from m import C\nC(field=1)", {"m C.", "m C(field)"}),
        ("from m import C\nC(**fields)", {"m C."}),
        ("from m import C\ndef f(x):\n    assert isinstance(x, C)\n    x.field", {"m C.", "m C:field:"}),
        ("from m import C\ndef f(x):\n    return type(x) is C and x.field", {"m C.", "m C:field:"}),
        ("from m import f as g\ndef h(g):\n    g.name", {"m f."}),
    ],
)
def test_uses_of_a_module(source: str, used: set[str]) -> None:
    uses = Uses("ours")
    uses.visit(ast.parse(source))
    assert {f"{thing.module} {thing.way}" for thing, _ in uses.used if thing.module.startswith("m")} == used


def test_fields_that_are_replaced() -> None:
    uses = Uses("ours")
    uses.visit(ast.parse("from dataclasses import replace\n" + TYPED + "replace(x, field=1)"))
    assert "C:field:" in {thing.way for thing, _ in uses.used}


def test_classes_with_what_they_define() -> None:
    uses = Uses("ours")
    source = "class C(Base):\n    a = 1\n    b: int\n    def f(self):\n        self._d = self.e = 1\n"
    uses.visit(ast.parse("from m import Base\n" + source))
    ((name, cls),) = uses.classes.items()
    assert (name.module, name.way) == ("ours", "C.") and [base.way for base in cls.bases] == ["Base."]
    assert cls.names == {"a": 3, "b": 4, "f": 5, "_d": 0}
