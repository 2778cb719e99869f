"""Reads entries of a config.json and checks their type and range.

A config is untrusted and may hold anything. Each reader raises ValueError with the key, the required type or range and
the actual value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1
MOST_LAYERS = 10_000


@contextmanager
def config_of(path: Path) -> Iterator[None]:
    """Puts the config's path in front of errors about its entries."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def whole(entries: Mapping[str, Any], key: str, least: int = 1, most: int = LARGEST) -> int:
    """A whole number within [least, most]."""
    value = entries.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{key} must be a whole number from {least} to {most}, not {shown(value)}")
    return value


def number(entries: Mapping[str, Any], key: str, above: float = 0.0) -> float:
    """A finite number greater than `above`."""
    value = entries.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, not {shown(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{key} must be a finite number greater than {above:g}, not {shown(value)}")
    return value


def numbers(entries: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A list of finite numbers greater than 0."""
    value = entries.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of numbers, not {shown(value)}")
    return tuple(number({key: one}, key) for one in value)


def flag(entries: Mapping[str, Any], key: str) -> bool:
    """True or false; null is false."""
    value = entries.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {shown(value)}")
    return bool(value)


def text(entries: Mapping[str, Any], key: str) -> str:
    """A string."""
    value = entries.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {shown(value)}")
    return value


def object_in(entries: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object; empty if the entry is null or missing."""
    value = entries.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, not {shown(value)}")
    return value or {}


def architecture_in(entries: Mapping[str, Any]) -> str | None:
    """The first entry of `architectures`; None if there is none."""
    names = entries.get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"architectures must be a list of names, not {shown(names)}")
    return names[0]


def labels_in(entries: Mapping[str, Any]) -> int:
    """The number of classes: the length of `id2label`, else `num_labels`."""
    return len(object_in(entries, "id2label")) or whole(entries, "num_labels")


def said(entries: Mapping[str, Any], *nullable: str) -> dict[str, Any]:
    """The entries of a config that are set. Null means unset, except for the entries in `nullable`."""
    return {key: value for key, value in entries.items() if value is not None or key in nullable}


def shown(value: Any) -> str:
    """A value as text for a message, cut to a readable length."""
    try:
        given = "null" if value is None else repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits; deep nesting
        given = f"a {type(value).__name__}"
    return given if len(given) <= 80 else given[:77] + "..."
