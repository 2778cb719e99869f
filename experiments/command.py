"""How every script here reads its command line, and what it says when something is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn, TypeVar

import tyro

import jaxcompress as jc

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded

T = TypeVar("T", bound="Command")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What all scripts take."""

    quick: bool = False
    """The same on the smallest sizes that still mean something, in seconds; other arguments may be given beside it."""


@dataclass(frozen=True, kw_only=True)
class OfModel(Command):
    """What scripts about a language model take."""

    model: str | None = None
    """What --model of the commands takes, `smollm2` say; the embedded model if not given."""

    def load(self) -> Loaded:
        """The model with float32 weights, and its tokenizer."""
        return jc.load_embedded() if self.model is None else jc.load(self.model, dtype="float32")


def arguments(quick: T, given: Sequence[str] | None = None) -> T:
    """What a script is to do.

    Args:
      quick: the defaults with `--quick`; those without are of its type.
      given: the command line without the program's name; that of this process by default.
    """
    given = sys.argv[1:] if given is None else given
    if "--quick" in given:
        return tyro.cli(type(quick), args=given, default=quick)
    return tyro.cli(type(quick), args=given)


def need(*modules: str, install: str) -> None:
    """Ends the program with exit code 2 if a module that the library itself does not need is not installed.

    Args:
      install: the command that installs it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        stop(f"this script needs {' and '.join(missing)}, not installed here: {install}")


def stop(why: str) -> NoReturn:
    """Ends the program with one line and exit code 2: this cannot be done here."""
    print(why, file=sys.stderr)
    raise SystemExit(2)
