"""Values in messages."""

from __future__ import annotations

from typing import Any


def described(given: Any) -> str:
    """Something in a message, with its kind where that is not plain."""
    if isinstance(given, str | int | float | bool | None):
        return repr(given)
    return f"{type(given).__name__} {given!r:.40}" if isinstance(given, list | tuple) else type(given).__name__
