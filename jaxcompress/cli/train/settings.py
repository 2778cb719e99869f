"""Settings of `train` from a TOML file and from the run that goes on: what flags have as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from jaxcompress.cli.parser import in_one_line
from jaxcompress.cli.train.arguments import SourceFlags
from jaxcompress.cli.train.command import Train
from jaxcompress.cli.train.presets import PRESETS
from jaxcompress.cli.train.record import read_record
from jaxcompress.inputs.text import parse_toml, read_text


@dataclass(frozen=True, kw_only=True)
class _Where(SourceFlags):
    """The flags that say where settings are."""

    out: Path | None = None
    data: str | None = None


def train_defaults(arguments: Sequence[str]) -> Train:
    """`train` as the files and the preset say that these arguments name; what only flags can say is `tyro.MISSING`.

    A TOML file wins over the run that goes on, and both win over a preset. A run that goes on has taken all it needs of
    its preset: what its record lacks has the flag's default.

    Args:
      arguments: of `train`, without its name.

    Raises:
      ValueError: not TOML, an unknown setting, or one of another type than its flag.
      OSError: a file cannot be read.
    """
    if "-h" in arguments or "--help" in arguments:
        return _with_open_flags({})
    where, _ = in_one_line("jaxcompress train", _Where, arguments, return_unknown_args=True, add_help=False)
    config: dict[str, Any] = {}
    if where.config is not None:
        config = _checked(parse_toml(read_text(where.config), str(where.config)), where.config)
        if "config" in config:
            raise ValueError(f"config in {where.config} does nothing; put all settings into one file")
    run: dict[str, Any] = {}
    out = where.out or config.get("out")
    if out and (where.resume or config.get("resume")):
        if (path := out.expanduser() / "run.json").exists():
            run = _checked(read_record(path)["settings"], path)
        elif where.data is None and "data" not in config:
            raise ValueError(f"there is no run in {out} to continue: {path} does not exist; --data begins one")
    preset = where.preset or config.get("preset")
    if run or not preset:
        return _with_open_flags(run | config)
    return _with_open_flags({**PRESETS[preset], "preset": preset, **config})


def _with_open_flags(values: dict[str, Any]) -> Train:
    """`Train` of these values. What has neither a value nor a default, the parser asks for."""
    required: dict[str, Any] = dict(data="", out=Path())
    made = Train(**(required | values))
    for name in required.keys() - values.keys():
        object.__setattr__(made, name, tyro.MISSING)  # not given to the constructor, which wants values
    return made


def _checked(settings: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The values of settings. Raises ValueError for one that is unknown, or of another type than its flag."""
    types = get_type_hints(Train)
    values = {}
    for name, value in settings.items():
        if name not in types:
            raise ValueError(f"unknown setting {name!r} in {where}; known: {', '.join(types)}")
        try:
            values[name] = _value(value, types[name])
        except TypeError:
            raise ValueError(f"{name} cannot be {value!r} in {where}; it is {_told(types[name])}") from None
    return values


def _value(value: Any, kind: Any) -> Any:
    """A value of TOML or JSON as one of a flag's type. Raises TypeError if it is of another type."""
    if get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            try:
                return _value(value, one)
            except TypeError:
                continue
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif get_origin(kind) is tuple:
        values = value if isinstance(value, list) else [value]
        if values:
            return tuple(_value(one, get_args(kind)[0]) for one in values)
    elif kind is NoneType:
        if value is None or value == "None":  # TOML has no null; the flag takes the word
            return None
    elif kind in (int, float):
        if isinstance(value, int if kind is int else int | float) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, str if kind is Path else kind):
        return kind(value)
    raise TypeError(value)


def _told(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_told, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of integers"
    return {int: "an integer", float: "a number", bool: "true or false", NoneType: '"None"'}.get(kind, "a text")
