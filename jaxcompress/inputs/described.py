"""Formats values for error messages."""

from __future__ import annotations

from typing import Any


def described(given: Any) -> str:
    """A value as text for a message. Lists, tuples and other objects are shown with their type."""
    if isinstance(given, str | int | float | bool | None):
        return repr(given)
    return f"{type(given).__name__} {given!r:.40}" if isinstance(given, list | tuple) else type(given).__name__
