"""What a module's source uses of others: what it imports, and the names that it looks up on that."""

from __future__ import annotations

import ast
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True, slots=True)
class Thing:
    """Something by a module and the way to it from there, which ends in how its next name is looked up.

    `Name.` looks on the thing itself, `Name:` on an instance of it, or on what it returns or is annotated with, and
    `Name^` on its bases.
    """

    module: str
    way: str = ""  # of the module itself

    def member(self, name: str) -> Thing:
        """What is found under `name`."""
        return Thing(self.module, f"{self.way}{name}{self.way[-1:] or '.'}")

    def instance(self) -> Thing:
        """An instance of it, or what it returns."""
        return Thing(self.module, f"{self.way[:-1]}:")

    def bases(self) -> Thing:
        """The bases of a class, as `super()` has them."""
        return Thing(self.module, f"{self.way[:-1]}^")

    def keyword(self, name: str) -> Thing:
        """A keyword argument of its call."""
        return Thing(self.module, f"{self.way[:-1]}({name})")


@dataclass(frozen=True, slots=True)
class OurClass:
    """A class of ours."""

    bases: list[Thing]
    names: dict[str, int] = field(
        default_factory=dict
    )  # that it defines -> the line, 0 outside of the class's own body
    types: dict[str, Thing] = field(default_factory=dict)  # of its attributes, where they are told


class Uses(ast.NodeVisitor):
    """Collects the uses of one module, in the order of the source."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.used: list[tuple[Thing, int]] = []  # and the line
        self.classes: dict[Thing, OurClass] = {}
        self.mentioned: set[str] = set()  # names that are read of anything
        self.inherited: set[str] = set()  # those that are looked up by `super()`
        self._scope: ChainMap[str, Thing | None] = ChainMap()
        self._class: Thing | None = None
        self._function = ""

    def visit_Module(self, node: ast.Module) -> None:
        for child in node.body:
            if isinstance(child, ast.ClassDef):  # functions know classes that come after them
                self._scope[child.name] = Thing(self.module).member(child.name)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.split(".")[0]
            self._scope[alias.asname or name] = Thing(name)
            self.used.append((Thing(alias.name), alias.lineno))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            found = Thing(node.module or "").member(alias.name)
            self._scope[alias.asname or alias.name] = found
            self.used.append((found, alias.lineno))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, Thing(self.module).member(node.name)
        bases = (self._thing(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases)
        self.classes[self._class] = OurClass([base for base in bases if base], dict(_defined(node)))
        self._inside(node)
        self._class = outer

    def visit_FunctionDef(self, node: Function) -> None:
        outer, self._function = self._function, getattr(node, "name", "")
        self._inside(node)
        self._function = outer

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_arguments(self, node: ast.arguments) -> None:
        self.generic_visit(node)
        for arg in ast.walk(node):
            if isinstance(arg, ast.arg):
                self._scope[arg.arg] = self._type(arg.annotation)
        if self._class is not None:
            self._scope |= {name: thing for name, thing in self._own().items() if name in self._scope.maps[0]}

    def visit_ListComp(self, node: Comprehension) -> None:
        self._inside(node, [*ast.iter_child_nodes(node)][::-1])  # what is looped over comes last

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_Assign(self, node: ast.Assign) -> None:
        pairs = [pair for target in node.targets for pair in _pairs(target, node.value)]
        things = [(target, self._thing(value)) for target, value in pairs]
        self.generic_visit(node)
        for target, thing in things:
            self._bind(target, thing)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self._bind(node.target, self._type(node.annotation))

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._scope[node.id] = None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.mentioned.add(node.attr)
        if found := self._thing(node):
            self.used.append((found, node.lineno))
            if found.way.endswith("^"):
                self.inherited.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword, thing in self._keywords(node):
            self.used.append((thing, keyword.lineno))
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), cls]):
                self._scope[name] = self._type(cls)

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        match node:  # type(name) is cls
            case ast.Compare(ast.Call(ast.Name(id="type"), [ast.Name(id=name)]), _, [cls]):
                self._scope[name] = self._type(cls)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):  # a method that vLLM is asked to call by name
            self.mentioned.add(node.value)

    def _keywords(self, node: ast.Call) -> Iterator[tuple[ast.keyword, Thing]]:
        """Keywords are fields where they are those of `replace`."""
        called = self._thing(node.func)
        replaced = self._thing(node.args[0]) if node.args and called == Thing("dataclasses", "replace.") else None
        for keyword in node.keywords:
            if keyword.arg and replaced:
                yield keyword, replaced.member(keyword.arg)
            elif keyword.arg and called:
                yield keyword, called.keyword(keyword.arg)

    def _inside(self, node: ast.AST, children: list[ast.AST] | None = None) -> None:
        """Visit what has names of its own."""
        self._scope = self._scope.new_child()
        for child in children or ast.iter_child_nodes(node):
            self.visit(child)
        self._scope = self._scope.parents

    def _own(self) -> dict[str, Thing]:
        """What methods call their class and its instances."""
        assert self._class is not None
        return {"self": self._class.instance(), "cls": self._class}

    def _bind(self, target: ast.expr, thing: Thing | None) -> None:
        match target:
            case ast.Name(id=name):
                self._scope[name] = thing
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self._class is not None:
                ours = self.classes[self._class]
                # Elsewhere than in __init__, a public name may be a base's that is given another value.
                if self._function == "__init__" or name.startswith("_"):
                    ours.names.setdefault(name, 0)
                    if thing:
                        ours.types.setdefault(name, thing)

    def _thing(self, node: ast.expr) -> Thing | None:
        """What an expression names, as far as imports tell."""
        match node:
            case ast.Name(id=name):
                return self._scope.get(name)
            case ast.Attribute(value=value, attr=name):
                return (owner := self._thing(value)) and owner.member(name)
            case ast.Call(func=ast.Name(id="super")):
                return self._class and self._class.bases()
            case ast.Call(func=called):
                return (owner := self._thing(called)) and owner.instance()
            case ast.Await(value=value):
                return self._thing(value)
        return None

    def _type(self, annotation: ast.expr | None) -> Thing | None:
        """An instance of what an annotation names, None aside; of several types, none."""
        match annotation:
            case ast.BinOp(left=one, right=ast.Constant(value=None)) | ast.Subscript(ast.Name(id="ClassVar"), one):
                return self._type(one)
            case ast.Subscript(ast.Name(id="type"), cls):
                return self._thing(cls)
            case ast.Name() | ast.Attribute():
                return (named := self._thing(annotation)) and named.instance()
        return None


def _defined(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Names in a class's body, and their lines."""
    for child in node.body:
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.AnnAssign(ast.Name(id=name)):
                yield name, child.lineno
            case ast.Assign(targets):
                yield from ((target.id, child.lineno) for target in targets if isinstance(target, ast.Name))


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Every target of an assignment with its value."""
    match target, value:
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            yield from zip(targets, values, strict=True)
        case _:
            yield target, value
