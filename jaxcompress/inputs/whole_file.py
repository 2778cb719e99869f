"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

SUFFIX = ".partial"
"""How the names of unfinished files end; they begin with a dot. A killed process leaves one behind."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write a file. It is at `path`, on disk, when the block has ended, and nothing is there if it failed.

        with whole_file("rows.json") as part:
            part.write_text(text, encoding="utf-8")

    An older file stays until then. Of several processes that write the same file, the last one wins.

    Raises:
      OSError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}{SUFFIX}")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def unfinished(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """The unfinished files in a folder whose names match a pattern."""
    yield from folder.glob(f".{pattern}.*{SUFFIX}")
