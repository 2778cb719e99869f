"""Paths that callers pass."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from jaxcompress.inputs.described import described


def path_of(given: Any, what: str) -> Path:
    """A path, with `~` as the home folder.

    Raises:
      ValueError: `given` is neither a string nor a path; the message names the path that it has, if it has one.
    """
    if isinstance(given, str | PathLike):
        return Path(given).expanduser()
    hint = "; give its .folder" if hasattr(given, "folder") else ""
    raise ValueError(f"{what} must be a path, a str or a pathlib.Path, not {described(given)}{hint}")
