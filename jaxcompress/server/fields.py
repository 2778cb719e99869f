"""The fields of a request body, each checked when it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from jaxcompress.server.errors import ApiError, refused


class Fields:
    """A JSON object whose fields are checked as they are read. A field that is null counts as not given.

    Args:
      body: the object.
      where: what stands before the names of its fields in messages, such as `messages[0].`.
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._body = {name: value for name, value in body.items() if value is not None}
        self._where = where
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return self._body.get(name, default)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, f"must be true or false, not {value!r:.60}")
        return value

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, f"must be a string, not {value!r:.60}")
        return value

    def object(self, name: str) -> Mapping[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, f"must be an object, not {value!r:.60}")
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, f"must be a whole number from {least} to {most}, not {value!r:.60}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, f"must be a number, not {value!r:.60}")
        if not least <= value <= most:
            raise self._wrong(name, f"must be from {least:g} to {most:g}, not {value!r:.60}")
        return float(value)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuses a field that asks for what the server cannot do."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise self._wrong(name, f"{value!r:.60} is not supported: {why}")

    def no_others(self, harmless: Collection[str]) -> None:
        """Refuses a field that was not read: whoever sent it expects another answer.

        Args:
          harmless: fields that change no answer.
        """
        for name in self._body:
            if name not in self._read and name not in harmless:
                near = get_close_matches(name, sorted(self._read), n=1)
                remedy = f"did you mean {near[0]}?" if near else "leave it out"
                raise self._wrong(name, f"is unknown here, and may be meant to change the answer; {remedy}")

    def _wrong(self, name: str, what: str) -> ApiError:
        return refused(self._where + name, f"{self._where}{name:.60} {what}")
