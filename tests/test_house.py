"""The rooms of the house: what may import what, and how large a file or function may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxcompress"

ROOMS = (
    "inputs", "state", "pallas_kernels", "policies", "recurrence", "models", "distributed", "budgets", "vision",
    "checkpoints", "generation", "serving", "training", "prompt", "evaluation", "server", "cli",
)  # fmt: skip
"""Each room imports only itself and the rooms before it. `embedded` holds data and paths: every room may use it."""

LAZY = ("cli", "training/__init__.py", "__init__.py", "__main__.py")
"""Where imports stand inside functions, so that the command line starts quickly."""

LINES, BODY, PARAMETERS = 500, 60, 8

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
"""What people copy: a page of text each, and nothing of the package that is not for everyone."""


def modules() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def imported(node: ast.AST) -> Iterator[str]:
    """The package's modules that a statement imports."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxcompress":
        names = [node.module] if "." in node.module else [f"jaxcompress.{alias.name}" for alias in node.names]
        yield from names
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("jaxcompress."))


def functions(module: str) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("module", [module for module in modules() if "/" in module])
def test_rooms_import_only_what_is_below_them(module: str) -> None:
    mine = module.split("/")[0]
    allowed = {*ROOMS[: ROOMS.index(mine) + 1], "_versions", "__version__"} if mine in ROOMS else set()
    allowed |= {"embedded", "_extras"}
    for node in ast.walk(tree(module)):
        for name in imported(node):
            assert room(name) in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in modules() if not module.startswith(LAZY)])
def test_no_import_inside_a_function(module: str) -> None:
    for function in functions(module):
        for node in ast.walk(function):
            assert not list(imported(node)), f"{module}: {function.name} imports {list(imported(node))}"


def test_no_circles() -> None:
    """Imports at the top of modules: from a module one never comes back to it."""
    names = {"jaxcompress." + module.removesuffix(".py").replace("/", ".") for module in modules()}
    edges = {}
    for module in modules():
        me = "jaxcompress." + module.removesuffix(".py").replace("/", ".")
        body = [node for node in tree(module).body if not isinstance(node, ast.If)]
        found = {
            target
            for node in body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jaxcompress")
            for alias in node.names
            for target in (node.module, f"{node.module}.{alias.name}")
        }
        edges[me] = {target for target in found if target in names}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("module", [module for module in modules() if not module.startswith("pallas_kernels")])
def test_files_and_functions_are_small(module: str) -> None:
    """Larger ones say why: parameters in a comment beside `def`, lines in the docstring: 70 lines, because ..."""
    text = (PACKAGE / module).read_text(encoding="utf-8").split("\n")
    lines = len(text) - 1
    assert lines <= LINES, f"{module} has {lines} lines"
    too_large = []
    for function in functions(module):
        said = ast.get_docstring(function) or ""
        names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        parameters = len([name for name in names if name not in ("self", "cls")])
        beside = text[function.lineno - 1]
        if parameters > PARAMETERS and not re.search(r"# (nine|ten|eleven|twelve|\w+teen) parameters: \w", beside):
            too_large.append(f"{function.name} has {parameters} parameters")
        body = function.body[1:] if said else function.body
        long = (function.end_lineno or 0) - body[0].lineno + 1 if body else 0
        if long > BODY and not re.search(r"\d+ lines\b", said):
            too_large.append(f"{function.name} has {long} lines")
    assert not too_large, f"{module}: {'; '.join(too_large)}"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_short_and_use_what_is_public(example: str) -> None:
    text = (ROOT / "examples" / example).read_text(encoding="utf-8")
    assert text.count("\n") <= BODY, f"{example} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        for name in imported(node):
            assert not any(part.startswith("_") for part in name.split(".")), f"{example} imports {name}"
