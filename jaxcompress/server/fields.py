"""The fields of a request body, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcompress.server.errors import refused


class Fields:
    """A JSON object whose fields are checked as they are read. A field that is null counts as not given."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = {name: value for name, value in body.items() if value is not None}

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def flag(self, name: str) -> bool:
        value = self._body.get(name, False)
        if not isinstance(value, bool):
            raise refused(name, f"{name} must be true or false, not {value!r:.60}")
        return value

    def text(self, name: str) -> str | None:
        value = self._body.get(name)
        if value is not None and not isinstance(value, str):
            raise refused(name, f"{name} must be a string, not {value!r:.60}")
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise refused(name, f"{name} must be a whole number from {least} to {most}, not {value!r:.60}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refused(name, f"{name} must be a number, not {value!r:.60}")
        if not least <= value <= most:
            raise refused(name, f"{name} must be from {least:g} to {most:g}, not {value!r:.60}")
        return float(value)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuses a field that asks for what the server cannot do."""
        value = self._body.get(name)
        if value is not None and value not in allowed:
            raise refused(name, f"{name} {value!r:.60} is not supported: {why}")
