"""Checks numbers that callers pass: Python or NumPy scalars, or arrays without dimensions. Returns Python numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import numpy as np

from jaxcompress.inputs.described import described

Number = int | float | np.generic | np.ndarray | jax.Array
"""The accepted types of a number. An array is accepted only if it has no dimensions."""


def number(value: Any, what: str) -> float:
    """Converts a value to a finite float.

    Raises:
      ValueError: the value is not a finite number: a bool, a string, NaN, an array with dimensions.
    """
    try:
        given = math.nan if _truth(value) or isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        given = math.nan
    if not math.isfinite(given):
        raise ValueError(f"{what} must be a finite number, not {value!r}")
    return given


def share(value: Any, what: str = "a rate", *, of: str = "tokens") -> float:
    """Converts a value to a float in (0, 1].

    Raises:
      ValueError: the value is not such a number.
    """
    try:
        given = number(value, what)
    except ValueError:
        given = math.nan
    if not 0 < given <= 1:
        raise ValueError(f"{what} must be in (0, 1], the share of {of} that stays, not {value}")
    return given


def whole(value: Any, what: str, *, least: int = 0) -> int:
    """Converts a value to a whole number of at least `least`. The float 3.0 is refused.

    Raises:
      ValueError: the value is not such a number.
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
