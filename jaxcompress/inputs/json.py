"""Reads JSON objects from untrusted files. Any bytes give an object or an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxcompress.inputs.text import decode, parse_json

MOST_BYTES = 2**26
"""The size limit. No config or index comes near it, and parsed objects take many times the memory of their text."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. If a key occurs twice, the last value counts.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the content is not JSON, is nested too deeply or is not an object; the file exceeds `MOST_BYTES`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config has some thousands, and {MOST_BYTES:,} at most")
    data = path.read_bytes()
    value = parse_json(decode(data, str(path)), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_object_if_there(path: Path) -> dict[str, Any]:
    """Like `read_object`, but returns an empty object if there is no file."""
    return read_object(path) if path.is_file() else {}
