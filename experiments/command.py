"""Reads the command lines of the scripts here, and ends a script when something is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import jaxcompress as jc
from jaxcompress.cli.parser import in_one_line

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded

T = TypeVar("T", bound="Command")


@dataclass(frozen=True, kw_only=True)
class Command:
    """The flags of all scripts."""

    quick: bool = False
    """Run on the smallest sizes that still mean something, in seconds. Other flags may be given too."""


@dataclass(frozen=True, kw_only=True)
class OfModel(Command):
    """The flags of scripts about a language model."""

    model: str | None = None
    """A value of the commands' --model, such as `smollm2`; the embedded model if not given."""

    def load(self) -> Loaded:
        """The model with float32 weights, and its tokenizer."""
        return jc.load_embedded() if self.model is None else jc.load(self.model, dtype="float32")


def arguments(quick: T, given: Sequence[str] | None = None) -> T:
    """The flags that a script was given. A wrong one ends the program with one line and exit code 2.

    Args:
      quick: the defaults with `--quick`. The defaults without it are those of its type.
      given: the command line without the program's name; that of this process by default.
    """
    given = sys.argv[1:] if given is None else given
    default: dict[str, Any] = dict(default=quick) if "--quick" in given else {}
    try:
        return in_one_line(sys.argv[0], type(quick), given, **default)
    except ValueError as error:
        stop(str(error))


def need(*modules: str, install: str) -> None:
    """Ends the program with exit code 2 if a module is not installed that the library itself does not need.

    Args:
      modules: their names.
      install: the command that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        stop(f"this script needs {' and '.join(missing)}, not installed here: {install}")


def stop(why: str) -> NoReturn:
    """Ends the program with one line on standard error and exit code 2."""
    print(why, file=sys.stderr)
    raise SystemExit(2)
