"""The public names of the package, and whether the reference has them all."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxcompress
from jaxcompress._extras import EXTRAS, FRAMEWORKS, MissingExtra

ROOMS = (
    "models", "policies", "generation", "serving", "evaluation", "training", "distributed", "checkpoints", "budgets",
    "prompt", "vision", "embedded",
)  # fmt: skip
PAGES = {**{room: room for room in ROOMS}, "inner": "state, recurrence"}
"""Pages of the reference and their titles, in the order in which they are listed."""
DIRECTIVE = re.compile(r"^::: jaxcompress\.([\w.]+)$", re.MULTILINE)
IMPORT = re.compile(r"^\s*from jaxcompress([\w.]*) import (.+)$", re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def names() -> dict[str, tuple[str, ...]]:
    """Every room and what it offers."""
    rooms = {name: value for name in jaxcompress.__all__ if isinstance(value := getattr(jaxcompress, name), ModuleType)}
    return {name: tuple(sorted(_offered(room))) for name, room in rooms.items()}


def _offered(room: ModuleType) -> Iterable[str]:
    if hasattr(room, "__all__"):
        return room.__all__
    return [name for name, value in vars(room).items() if _ours(value) and not name.startswith("_")]


def _ours(value: Any) -> bool:
    here = getattr(value, "__module__", "") or ""
    return not isinstance(value, ModuleType) and here.startswith("jaxcompress")


def exported(path: str) -> str:
    """The public path of a name that is listed by the module of the same name: `generation.generate.generate`."""
    room, *rest = path.split(".")
    return f"{room}.{rest[-1]}" if len(rest) == 2 and rest[0] == rest[1] else path


def has_docstring(value: Any) -> bool:
    """Values that are no functions or classes are explained on the page that lists them."""
    return bool(inspect.getdoc(value)) or not (inspect.isfunction(value) or inspect.isclass(value))


@cache
def _places() -> dict[str, str]:
    """name -> its path, for names that stand for one thing only."""
    found: dict[str, set[str]] = {}
    for page in (Path(__file__).parents[1] / "api").glob("*.md"):
        for path in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            found.setdefault(path.rpartition(".")[2], set()).add(f"jaxcompress.{path}")
            found.setdefault(path, set()).add(f"jaxcompress.{path}")
    for room, offered in names().items():
        for name in offered:
            found.setdefault(name, set()).add(f"jaxcompress.{room}.{name}")
            found.setdefault(f"{room}.{name}", set()).add(f"jaxcompress.{room}.{name}")
    for page in (Path(__file__).parents[1] / "api").glob("*.md"):
        for path in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if (short := exported(path)) != path:
                found[short] = found[short.rpartition(".")[2]] = {f"jaxcompress.{path}"}
    return {name: paths.copy().pop() for name, paths in found.items() if len(paths) == 1 and len(name) > 4}


def place(name: str) -> str | None:
    """The path under which the reference has what a page calls so."""
    return _places().get(name)


def problems(pages: Iterable[str]) -> list[str]:
    """What is wrong with the reference: names that are missing, twice there, or without a docstring.

    Args:
      pages: the Markdown of every page of the site.
    """
    texts = list(pages)
    listed = Counter(exported(path) for text in texts for path in DIRECTIVE.findall(text))
    wrong = [f"the reference has {path} {count} times" for path, count in listed.items() if count > 1]
    wanted = {f"{room}.{name}" for room, offered in names().items() for name in offered}
    wrong += [f"the reference lacks {path}" for path in sorted(wanted - set(listed))]
    for text in texts:
        for block in PYTHON.findall(text):
            for module, imported in IMPORT.findall(block):
                wrong += _unlisted(module.lstrip("."), imported, listed)
    for path in listed:
        if _of_a_framework(path):
            continue
        value = _value(path)
        if value is None or not has_docstring(value):
            wrong.append(f"{path} has no docstring")
    return sorted(set(wrong))


def _of_a_framework(path: str) -> bool:
    """Whether a path needs a package that is not installed, of an extra that `jaxcompress[all]` does not have."""
    try:
        import_module(f"jaxcompress.{path.rpartition('.')[0]}")
    except MissingExtra as missing:
        return any(missing.name in EXTRAS[name].modules for name in FRAMEWORKS)
    except ImportError:
        pass
    return False


def _unlisted(module: str, imported: str, listed: Counter[str]) -> list[str]:
    """Names that a page imports and the reference does not have; a module may be listed as a whole."""
    found = []
    for name in re.findall(r"\w+", imported.partition(" as ")[0]):
        path = f"{module}.{name}".lstrip(".")
        if not {path, module} & set(listed) and not isinstance(_value(path), ModuleType):
            found.append(f"pages import {path}, which the reference lacks")
    return found


def _value(path: str) -> Any:
    """What a path names; a module goes before a function of the same name that its package exports."""
    parts = path.split(".")
    value: Any = jaxcompress
    for at, part in enumerate(parts):
        exported = at == len(parts) - 1 and hasattr(value, part)
        try:
            module = None if exported else import_module(".".join(["jaxcompress", *parts[: at + 1]]))
        except ImportError:
            module = None
        value = getattr(value, part, None) if module is None else module
    return value
