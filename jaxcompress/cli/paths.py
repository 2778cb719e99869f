"""Paths and policies that a command is given, looked at before anything is loaded: a model may take minutes.

A flag says with a mark what it names: `file: Annotated[Path | None, READ]`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from jaxcompress.inputs.text import check_file


class PathMark(NamedTuple):
    """What a flag names.

    Attributes:
      check: takes a value of the flag, and raises OSError or ValueError where it cannot be used.
    """

    check: Callable[[Any], None]


def check_paths(command: Any) -> None:
    """Raises OSError or ValueError for a path of a command that cannot be used, or a policy that is not known."""
    hints = get_type_hints(type(command), include_extras=True)
    for field in dataclasses.fields(command):
        marks = [mark for mark in getattr(hints[field.name], "__metadata__", ()) if isinstance(mark, PathMark)]
        value = getattr(command, field.name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            for mark in marks:
                mark.check(one)


def _check_folder(path: Path) -> None:
    path = path.expanduser().absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; give a folder, which is made if it is missing")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} cannot be written into: permission denied")


def _check_policy(name: str) -> None:
    from jaxcompress.policies.names import get_policy, own_places
    from jaxcompress.policies.own import check_place

    if ":" in name:  # code of one's own, which runs when the policy is made
        for place in own_places(name):
            check_place(place)
    elif "learned" not in name:  # that one comes with the model
        get_policy(name)


def _check_trained(name: str) -> None:
    from jaxcompress.training.policy_objectives import TRAINABLE

    if name in TRAINABLE:
        return
    try:
        _check_policy(name)
    except ValueError as error:
        raise ValueError(f"{error}. Policies to be learned: {', '.join(TRAINABLE)}") from None


def _check_pool(text: str) -> None:
    name, colon, _ = text.rpartition(":")
    if colon:
        _check_policy(name)


READ = PathMark(check_file)
"""A file that is read; `-` is standard input."""

FOLDER = PathMark(_check_folder)
"""A folder that is written into, and made if it is missing."""

POLICY = PathMark(_check_policy)
"""The name of a policy, which may be one of a file: FILE.py:NAME."""

TRAINED = PathMark(_check_trained)
"""The same, or the name of a policy that is to be learned."""

POOL = PathMark(_check_pool)
"""The same with a number of slots: FILE.py:NAME:SLOTS."""
