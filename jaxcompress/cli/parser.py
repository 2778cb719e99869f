"""From the words of a command line to a command. What the parser refuses is one ValueError of one line."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

_BOX = re.compile(r"[╭╮╰╯│]|\x1b\[[0-9;]*m")  # and colours
_FLAG = re.compile(r"--[a-z][a-z-]*(?= [A-Z{\[])")
_RULE = re.compile(r"^[─-]+$")  # the latter where the terminal is not UTF-8

_REGISTRY = ConstructorRegistry()
"""What help says of the values of flags."""


def parsed(
    commands: dict[str, type], arguments: Sequence[str], *, description: str, defaults: dict[str, Any] | None = None
) -> Any:
    """The command that these arguments ask for.

    Args:
      commands: by name.
      arguments: the command line without the program's name.
      defaults: by name of a command, its values where no flag is given.

    Raises:
      ValueError: no command, an unknown one, or flags that it does not take.
      SystemExit: help was asked for, and printed.
    """
    names = ", ".join(commands)
    if not arguments:
        raise ValueError(f"give a command: {names}; jaxcompress --help says what they do")
    if arguments[0] not in (*commands, "-h", "--help") and not arguments[0].startswith("--tyro-"):
        raise ValueError(f"unknown command {arguments[0]!r}; known: {names}")
    kinds: Any = Union[tuple(_annotated(name, kind, (defaults or {}).get(name)) for name, kind in commands.items())]  # noqa: UP007  made from values
    return in_one_line(f"jaxcompress {arguments[0]}", kinds, arguments, prog="jaxcompress", description=description)


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """`T | None` is shown as T, unless T is a choice of words. The word None may still be given."""
    if info.type_origin not in (Union, UnionType) or NoneType not in get_args(info.type):
        return None
    others: Any = Union[tuple(kind for kind in get_args(info.type) if kind is not NoneType)]  # noqa: UP007  made from values
    of = ConstructorRegistry.get_primitive_spec(dataclasses.replace(info, type=others, type_origin=get_origin(others)))
    if isinstance(of, UnsupportedTypeAnnotationError):
        return of
    if of.choices is not None:  # tyro shows None among them
        return None
    nargs = of.nargs
    if nargs != "*":
        counts = {1, *(nargs if isinstance(nargs, tuple) else (nargs,))}
        nargs = tuple(sorted(counts)) if len(counts) > 1 else 1
    return dataclasses.replace(
        of,
        nargs=nargs,
        instance_from_str=lambda given: None if given == ["None"] else of.instance_from_str(given),
        is_instance=lambda value: value is None or of.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else of.str_from_instance(value),
    )


def _annotated(name: str, kind: type, default: Any) -> Any:
    """A command for the parser. Where values come from elsewhere, a flag can be turned off too: --no-FLAG."""
    if default is not None:
        return Annotated[kind, tyro.conf.subcommand(name, default=default)]
    return Annotated[tyro.conf.FlagCreatePairsOff[kind], tyro.conf.subcommand(name)]


def in_one_line(program: str, kind: Any, arguments: Sequence[str], **how: Any) -> Any:
    """What `tyro.cli` makes of arguments.

    Args:
      program: whose --help says more.
      kind: the type of what is returned.
      how: keywords of `tyro.cli`.

    Raises:
      ValueError: what tyro prints in a box on standard error, in one line.
      SystemExit: help was asked for.
    """
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            return tyro.cli(kind, args=arguments, registry=_REGISTRY, **how)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise ValueError(f"{_unboxed(told.getvalue())}; see {program} --help") from None


def _unboxed(box: str) -> str:
    """The message in tyro's box. Of the flags that it describes, their names."""
    title, *lines = (_BOX.sub("", line).strip() for line in box.splitlines())
    sections: list[list[str]] = [[]]
    for line in lines:
        if _RULE.match(line):
            sections.append([])
        else:
            sections[-1].append(line)
    first, *others = [said for section in sections if (said := " ".join(filter(None, section)))] or [title]
    if first.startswith("Missing from"):
        first = f"missing: {_flags(first)}"
    similar = next((_flags(part) for part in others if part.startswith("Perhaps you meant")), "")
    return first[:1].lower() + first[1:].rstrip(".") + (f"; perhaps you meant {similar}" if similar else "")


def _flags(text: str) -> str:
    """The flags in a text, each once."""
    return ", ".join(dict.fromkeys(flag for flag in _FLAG.findall(text) if flag != "--help"))
