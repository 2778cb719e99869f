"""How keys and values are stored: as they are, or as small numbers with a scale per slot and head.

A vector is quantised once, when its token enters, and never again: every slot has a scale of its own, so that nothing
that comes later can change what is stored. The error of a number is at most half a step: about absmax / 250 of its
vector for int8, absmax / 14 for int4, and a sixteenth of the number itself for fp8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

_LARGEST = {"int8": 127.0, "uint8": 7.0, "float8_e4m3fn": 448.0}  # codes; uint8 holds two of 4 bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """Vectors of D numbers as codes and one scale each.

    Attributes:
      codes: [..., D] int8 or float8_e4m3fn, or [..., D / 2] uint8, each holding two numbers of 4 bits.
      scale: [...] bfloat16; a number is its code times the scale.
    """

    codes: Shaped[Array, "..."]
    scale: Shaped[Array, "..."]


Stored = Array | Quantised
"""Vectors as a state keeps them."""

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
"""Names of what a state can be stored in; the last three carry a scale per slot and head."""


def zeros(shape: tuple[int, ...], dtype: Any) -> Stored:
    """Room for vectors [..., D].

    Args:
      dtype: one of `DTYPES`, by name or as a dtype.

    Raises:
      ValueError: another dtype, or an odd D for int4.
    """
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"a state cannot be stored as {name}; known: {', '.join(DTYPES)}")
    if name not in ("float8_e4m3fn", "int8", "int4"):
        return jnp.zeros(shape, dtype)
    width = shape[-1]
    if name == "int4":
        if width % 2:
            raise ValueError(f"int4 packs two numbers into a byte: the width of a head must be even, not {width}")
        return Quantised(jnp.zeros((*shape[:-1], width // 2), jnp.uint8), jnp.zeros(shape[:-1], jnp.bfloat16))
    return Quantised(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.bfloat16))


def store(x: Float[Array, "... D"], like: Stored) -> Stored:
    """Vectors in the form of `like`."""
    if isinstance(like, jax.Array):
        return x.astype(like.dtype)
    largest = _LARGEST[like.codes.dtype.name]
    x = x.astype(jnp.float32)
    # bfloat16 keeps 8 bits: a little more than absmax / largest, so that rounding the scale never clips a number.
    scale = (jnp.abs(x).max(-1) * ((1 + 2**-7) / largest)).astype(jnp.bfloat16)
    codes = x / jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    if like.codes.dtype == jnp.float8_e4m3fn:
        return Quantised(jnp.clip(codes, -largest, largest).astype(like.codes.dtype), scale)
    codes = jnp.clip(jnp.round(codes), -largest, largest).astype(jnp.int8)
    return Quantised(_pack(codes) if like.codes.dtype == jnp.uint8 else codes, scale)


def split(stored: Stored) -> tuple[Float[Array, "... D"], Array | None]:
    """Numbers to multiply with, and the scale that each vector's products still need; None for plain numbers.

    Products can be scaled after they were summed, which costs one multiplication per slot instead of D.
    """
    if isinstance(stored, jax.Array):
        return stored, None
    codes = _unpack(stored.codes) if stored.codes.dtype == jnp.uint8 else stored.codes
    return codes.astype(jnp.float32), stored.scale.astype(jnp.float32)


def load(stored: Stored) -> Float[Array, "... D"]:
    """The vectors: float32 if they were quantised, else as they are."""
    numbers, scale = split(stored)
    return numbers if scale is None else numbers * scale[..., None]


def _pack(codes: Shaped[Array, "... D"]) -> Shaped[Array, "..."]:
    """Numbers -8..7, the first half of a vector in the low bits."""
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=-1)
    return low | (high << 4)


def _unpack(packed: Shaped[Array, "..."]) -> Shaped[Array, "... D"]:
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.int8) - 8
