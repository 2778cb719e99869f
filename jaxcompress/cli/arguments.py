"""What the parser lets through and no command can use: arguments that are not UTF-8, numbers that are NaN.

Such an argument is refused and named. Nothing is replaced, since the person who typed it can mend it. (In data it is
replaced, see `jaxcompress.inputs.text`.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

_INT32 = 2**31 - 1


def check_text(arguments: Sequence[str]) -> None:
    """Raises ValueError for an argument whose bytes are not UTF-8; names it by its flag."""
    flag = ""
    for number, argument in enumerate(arguments, 1):
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
        if wrong := next((character for character in argument if "\ud800" <= character <= "\udfff"), None):
            raw = ord(wrong) - 0xDC00  # how Python spells a byte that it could not decode
            what = f"byte 0x{raw:02x}" if 0x80 <= raw <= 0xFF else f"half of a character, {ascii(wrong)},"
            where = ascii(flag)[1:-1] if flag else f"argument {number}"
            raise ValueError(
                f"{where} is not UTF-8: {what} in {ascii(argument)}; convert the text, or read it from a file or "
                "standard input that is UTF-8"
            )


def check_numbers(command: Any) -> None:
    """Raises ValueError for a setting of a command that is NaN, beyond 32 bits, or an empty list; names its flag."""
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if value == () and field.default != ():
            raise ValueError(f"{flag} needs at least one value")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and math.isnan(one):
                raise ValueError(f"{flag} must be a number, not {one}")
            if isinstance(one, int) and abs(one) > _INT32:
                raise ValueError(f"{flag} must lie between -{_INT32:,} and {_INT32:,}, not {one:,}")
