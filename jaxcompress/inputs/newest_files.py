"""Files of a folder within a limit of bytes: those that were used longest ago go first."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def keep_newest(folder: Path, most: int, suffix: str = "") -> None:
    """Deletes the files of a folder that were used longest ago, until the others take at most so many bytes.

    A file that another program deletes meanwhile, or that may not be deleted, is passed over.

    Args:
      suffix: of the files that count; "": all.
    """
    files = _files(folder, suffix)
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        with suppress(OSError):
            os.unlink(path)
            total -= size


def bytes_of(folder: Path, suffix: str = "") -> int:
    """How much the files of a folder take, which need not exist."""
    return sum(size for _, size, _ in _files(folder, suffix))


def _files(folder: Path, suffix: str) -> list[tuple[float, int, str]]:
    """When each file was last used, its bytes, and its path."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.name.endswith(suffix):
                    facts = entry.stat()
                    found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, entry.path))
    return found
