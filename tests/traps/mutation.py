"""Bugs that tests catch: each stands at its test, and names what it breaks by the function.

    def inverted(hidden_blocks, *args):
        return ~hidden_blocks(*args)

    @catches(
        "inverted compression mask",
        "completed blocks are hidden, the others shown",
        Replaced("nsa_kernels.pytorch:hidden_blocks", inverted),
    )
    def test_trap_inverted_compression_mask() -> None: ...

A target is a package and the name of a function (or method, or module constant) in it, wherever in
the package it stands. ``Replaced`` puts another function in its place, ``Rewritten`` changes an
expression inside it. Nothing happens when the test itself runs: ``run_mutations.py`` puts each bug
into a copy of the tree and sees the test fail there.

This module is imported by the code with a bug in it: it needs the standard library alone.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"nsa_kernels": "kernels/nsa_kernels", "nsa_dist": "nsa_dist", "launch": "launch"}
Function = TypeVar("Function", bound=Callable[..., None])


class MisfitError(LookupError):
    """The code has changed, and a mutation has to follow it."""


# Patterns. `$NAME` stands for any expression, the same one wherever it appears again, and
# `$...NAME` for any number of arguments.


def parse_pattern(text: str) -> ast.AST:
    """An expression, or one statement, with wildcards as names."""
    text = re.sub(r"\$\.\.\.(\w+)", r"*rest__\1", text)
    text = re.sub(r"\$(\w+)", r"any__\1", text)
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _wildcard(pattern: object) -> str | None:
    if isinstance(pattern, ast.Name) and pattern.id.startswith("any__"):
        return pattern.id
    return None


def _rest(pattern: object) -> str | None:
    value = pattern.value if isinstance(pattern, ast.Starred) else None
    if isinstance(value, ast.Name) and value.id.startswith("rest__"):
        return value.id
    return None


Found = dict[str, Any]


def _same(a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, ast.AST) and isinstance(b, ast.AST):
        return type(a) is type(b) and all(
            _same(getattr(a, name, None), getattr(b, name, None))
            for name in a._fields
            if name != "ctx"
        )
    return type(a) is type(b) and a == b


def match(pattern: object, node: object, found: Found) -> Found | None:
    """What the wildcards stand for where ``node`` is as ``pattern`` says; None where it is not."""
    name = _wildcard(pattern)
    if name is not None:
        if not isinstance(node, ast.expr):
            return None
        if name in found:
            return found if _same(found[name], node) else None
        return {**found, name: node}
    if isinstance(pattern, list):
        return _match_all(pattern, node, found) if isinstance(node, list) else None
    if isinstance(pattern, ast.AST):
        if type(pattern) is not type(node):
            return None
        for part in pattern._fields:
            if part != "ctx":
                new = match(getattr(pattern, part, None), getattr(node, part, None), found)
                if new is None:
                    return None
                found = new
        return found
    return found if _same(pattern, node) else None


def _match_all(pattern: list[Any], nodes: list[Any], found: Found) -> Found | None:
    if not pattern:
        return found if not nodes else None
    name = _rest(pattern[0])
    if name is None:
        first = match(pattern[0], nodes[0], found) if nodes else None
        return None if first is None else _match_all(pattern[1:], nodes[1:], first)
    for count in range(len(nodes) + 1):
        taken = nodes[:count]
        if name not in found or _same(found[name], taken):
            rest = _match_all(pattern[1:], nodes[count:], {**found, name: taken})
            if rest is not None:
                return rest
    return None


class _Filled(ast.NodeTransformer):
    """A replacement with its wildcards filled in."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def visit_Name(self, node: ast.Name) -> ast.AST:
        name = _wildcard(node)
        return node if name is None else copy.deepcopy(self.found[name])

    def visit_Starred(self, node: ast.Starred) -> Any:
        name = _rest(node)
        return self.generic_visit(node) if name is None else copy.deepcopy(self.found[name])


class _Rewriter(ast.NodeTransformer):
    """Puts ``new`` wherever ``old`` stands."""

    def __init__(self, old: ast.AST, new: ast.AST, found: Found) -> None:
        self.old, self.new, self.found = old, new, found
        self.count = 0

    def visit(self, node: ast.AST) -> Any:
        found = match(self.old, node, self.found)
        if found is None:
            return self.generic_visit(node)
        self.count += 1
        return _Filled(found).visit(copy.deepcopy(self.new))


# Targets.


@dataclass(frozen=True)
class Place:
    """A function, method or module constant: ``body[at]`` in the parsed ``file``."""

    file: Path
    module: ast.Module
    body: list[ast.stmt]
    at: int

    @property
    def node(self) -> ast.stmt:
        return self.body[self.at]


def find_target(root: Path, target: str) -> Place:
    """Where in the tree ``"package:name"`` or ``"package:Class.name"`` stands.

    Raises:
        MisfitError: unless there is one such place in the package.
    """
    package, name = target.split(":")
    top, *parts = package.split(".")
    path = root.joinpath(FOLDERS[top], *parts)
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    places = []
    for file in files:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if name.split(".")[-1] in text:
            module = ast.parse(text)
            places += [Place(file, module, *where) for where in _named(module.body, name)]
    if len(places) != 1:
        where = ", ".join(str(place.file.relative_to(root)) for place in places) or "nowhere"
        raise MisfitError(f"{target} must stand in one place, got {where}")
    return places[0]


def _named(body: list[ast.stmt], name: str) -> Iterator[tuple[list[ast.stmt], int]]:
    first, _, rest = name.partition(".")
    for at, node in enumerate(body):
        if isinstance(node, ast.ClassDef) and node.name == first and rest:
            yield from _named(node.body, rest)
        elif isinstance(node, ast.FunctionDef) and node.name == first:
            # A method of a nested function is found by the function's name.
            yield body, at
        elif isinstance(node, ast.Assign) and any(
            isinstance(x, ast.Name) and x.id == name for x in node.targets
        ):
            yield body, at


# Changes of the code.


@dataclass(frozen=True)
class Replaced:
    """``by`` runs in the place of the target, with the target before its arguments.

    by: a function at the top of a test's module. Processes that the test starts run it as well.
    """

    target: str
    by: Callable[..., Any]

    def text(self, root: Path) -> tuple[Path, str]:
        """The file of the target, and its text with the bug in it."""
        place = find_target(root, self.target)
        function = place.node
        assert isinstance(function, ast.FunctionDef)
        name, module = function.name, module_of(self.by)
        bug = f'with_bug({name}, "{module}", "{self.by.__qualname__}")'
        line = f"{name} = __import__({__name__!r}, fromlist=['with_bug']).{bug}"
        place.body[place.at + 1 : place.at + 1] = ast.parse(line).body
        return place.file, ast.unparse(place.module)


def with_bug(original: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """``original`` with the function ``name`` of ``module`` in its place."""

    @functools.wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        # Found when called: the test's module imports the one with the bug.
        return getattr(importlib.import_module(module), name)(original, *args, **options)

    return call


@dataclass(frozen=True)
class Rewritten:
    """Inside the target ``old`` becomes ``new``: two patterns of an expression or statement.

    count: how many times ``old`` must stand there. given: other patterns that each stand there
    once, and tell which wildcard is which: a pattern that names no local variable breaks with
    the name of none.
    """

    target: str
    old: str
    new: str
    count: int = 1
    given: tuple[str, ...] = ()

    def text(self, root: Path) -> tuple[Path, str]:
        """The file of the target, and its text with the bug in it."""
        place = find_target(root, self.target)
        found: Found = {}
        for text in self.given:
            pattern = parse_pattern(text)
            matches = [match(pattern, node, found) for node in ast.walk(place.node)]
            matches = [x for x in matches if x is not None]
            if len(matches) != 1:
                raise MisfitError(f"{text} must stand once in {self.target}, got {len(matches)}")
            found = matches[0]
        rewriter = _Rewriter(parse_pattern(self.old), parse_pattern(self.new), found)
        place.body[place.at] = rewriter.visit(place.node)
        if rewriter.count != self.count:
            raise MisfitError(
                f"{self.old} must stand {self.count} times in {self.target}, got {rewriter.count}"
            )
        return place.file, ast.unparse(ast.fix_missing_locations(place.module))


# Mutations, and the tests at which they stand.


@dataclass(frozen=True)
class Mutation:
    """A bug and the test that must fail with it.

    trap and bug are the first two columns of the table in tests/README.md; file is the test's,
    from tests/; case is its parameters' id.
    """

    trap: str
    bug: str
    change: Replaced | Rewritten
    file: str
    test: str

    @property
    def folder(self) -> str:
        return self.file.split("/")[0]

    @property
    def of_kernel(self) -> bool:
        """Whether the bug is one of Triton's kernels."""
        return self.change.target.startswith("nsa_kernels.triton")

    @property
    def label(self) -> str:
        """A test id that a person can read."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.trap}: {self.bug}".lower())

    @property
    def node(self) -> str:
        """The test as pytest is told it."""
        return f"tests/{self.file}::{self.test}"

    @property
    def row(self) -> str:
        """The row of the table in tests/README.md."""
        file = self.file.removeprefix(f"{self.folder}/")
        return f"| {self.trap} | {self.bug} | `{file}::{self.test}` |"


_MUTATIONS: dict[str, Mutation] = {}  # by row: a module may be imported twice


def _file_of(function: Callable[..., Any]) -> str:
    """From tests/."""
    path = Path(function.__code__.co_filename).resolve()  # type: ignore[attr-defined]
    return path.relative_to(ROOT / "tests").as_posix()


def module_of(function: Callable[..., Any]) -> str:
    """The module of a function of tests/, as it is imported by name."""
    return "tests." + _file_of(function).removesuffix(".py").replace("/", ".")


def catches(
    trap: str, bug: str, change: Replaced | Rewritten, *, case: str = ""
) -> Callable[[Function], Function]:
    """The test fails when ``change`` puts a bug in.

    Args:
        trap: what others fell into.
        bug: how the change falls into it.
        case: the id of the test's parameters with which it fails, if it has any.
    """

    def register(test: Function) -> Function:
        name = f"{test.__name__}[{case}]" if case else test.__name__
        mutation = Mutation(trap, bug, change, _file_of(test), name)
        _MUTATIONS[mutation.row] = mutation
        return test

    return register


def modules_with_mutations() -> list[str]:
    """The modules of tests at which mutations stand."""
    here = ROOT / "tests"
    files = (x for x in sorted(here.rglob("test_*.py")) if x.parent.name != "__pycache__")
    return [
        "tests." + file.relative_to(here).with_suffix("").as_posix().replace("/", ".")
        for file in files
        if "\n@catches(" in file.read_text(encoding="utf-8")
    ]


def all_mutations() -> tuple[list[Mutation], set[str]]:
    """Every mutation, and the files (from tests/) whose package is not installed here.

    Imports the modules of all their tests.
    """
    import pytest

    missing = set()
    for module in modules_with_mutations():
        try:
            importlib.import_module(module)
        except pytest.skip.Exception:
            missing.add(module.removeprefix("tests.").replace(".", "/") + ".py")
    return list(_MUTATIONS.values()), missing
