"""Text that every Python installation has: documentation topics and the sources of the standard library.

The embedded model is trained on one part of it and measured on the other. Whole documents are held out, never lines:
source files, and groups of documentation topics that quote one another.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
}
_SKIPPED_FILES = {"pydoc_data/topics.py"}
_HELD_OUT_SHARE = 16  # one source file in so many
_HELD_OUT_FILES = {"pdb.py"}  # its docstrings are the debugger topic
_HELD_OUT_TOPICS = {"debugger", "assignment", "typesmapping", "import", "calls", "binary", "raise"}
_SHARED_PARAGRAPH = 160  # characters; topics with such a paragraph in common are one group


class Document(NamedTuple):
    """A text and where it came from: `topics/NAME`, or a path inside the standard library."""

    name: str
    text: str
    held_out: bool


def documents() -> list[Document]:
    """All documents of this Python installation, in a fixed order."""
    return [*_topics(), *_sources()]


def held_out(kind: str = "") -> list[Document]:
    """The documents that training never sees; `kind` is a prefix of their names (`topics/` for prose)."""
    return [d for d in documents() if d.held_out and d.name.startswith(kind)]


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    group = {name: name for name in topics}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    owner: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraph = " ".join(paragraph.split())
            if len(paragraph) >= _SHARED_PARAGRAPH:
                a, b = root(name), root(owner.setdefault(paragraph, name))
                group[max(a, b)] = min(a, b)
    chosen = {root(name) for name in _HELD_OUT_TOPICS if name in topics}
    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name], root(name) in chosen)


def _sources() -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if name in _SKIPPED_FILES or _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # sources in another declared encoding, broken links
        if len(text) > 200:
            chosen = name in _HELD_OUT_FILES or zlib.crc32(name.encode()) % _HELD_OUT_SHARE == 0
            yield Document(name, text, chosen)
