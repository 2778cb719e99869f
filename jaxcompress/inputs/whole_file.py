"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"
"""How the names of unfinished files end; they begin with a dot. A killed process leaves one behind."""


@contextmanager
def whole_file(path: str | Path, *, writer: str = "") -> Iterator[Path]:
    """Where to write a file. It is at `path`, on disk, when the block has ended, and nothing is there if it failed.

        with whole_file("rows.json") as part:
            part.write_text(text, encoding="utf-8")

    An older file stays until then. What a killed process left is overwritten by the next that writes the file.

    Args:
      writer: a name of its own for each process, where several may write the same file at once: the last one wins.

    Raises:
      OSError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{writer}{SUFFIX}" if writer else f".{path.name}{SUFFIX}")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def unfinished(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """The unfinished files in a folder whose names, with their writers, match a pattern."""
    yield from folder.glob(f".{pattern}{SUFFIX}")
