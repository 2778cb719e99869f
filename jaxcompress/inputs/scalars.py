"""Numbers that callers give: Python's own, numpy's, or arrays without dimensions. What comes out is Python's own."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import numpy as np

from jaxcompress.inputs.described import described

Number = int | float | np.generic | np.ndarray | jax.Array
"""What may be given where a number is wanted; an array only if it has no dimensions."""


def number(value: Any, what: str) -> float:
    """A finite number.

    Raises:
      ValueError: it is none: a bool, a string, NaN, an array with dimensions.
    """
    try:
        given = math.nan if _truth(value) or isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        given = math.nan
    if not math.isfinite(given):
        raise ValueError(f"{what} must be a finite number, not {value!r}")
    return given


def share(value: Any, what: str = "a rate", *, of: str = "tokens") -> float:
    """A number in (0, 1].

    Raises:
      ValueError: it is none.
    """
    try:
        given = number(value, what)
    except ValueError:
        given = math.nan
    if not 0 < given <= 1:
        raise ValueError(f"{what} must be in (0, 1], the share of {of} that stays, not {value}")
    return given


def whole(value: Any, what: str, *, least: int = 0) -> int:
    """A whole number that is not below `least`; 3.0 is none.

    Raises:
      ValueError: it is none.
    """
    try:
        given = None if _truth(value) or np.ndim(value) else operator.index(value)
    except (TypeError, ValueError):
        given = None
    if given is None or given < least:
        raise ValueError(f"{what} must be a whole number, at least {least}, not {described(value)}")
    return given


def _truth(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_
