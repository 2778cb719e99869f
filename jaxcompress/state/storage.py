"""The storage of keys and values: unchanged, or as small codes with a scale per slot and head.

A vector is quantised once, when its token enters, and never again. Every slot has its own scale, so later tokens cannot
change stored vectors. Storing loaded vectors again gives the same codes and scale (unless the largest number is below
1e-32, which is effectively zero). With m the largest magnitude in a vector of D numbers, a number x is restored with an
error of at most

  float8_e4m3fn   |x| / 16, or m / 450,000 if that is more                             D + 2 bytes
  int8            m / 253                                                              D + 2 bytes
  int4            m / 13.9 in the root mean square of a vector, 0.31 m for any x       D / 2 + 2 bytes

Codes are symmetric around 0 and reach 448, 127 and 7. For int4 the largest numbers may be clipped if that reduces the
error of the vector: the scale is the best of several. Float16 overflows to infinity beyond 65,504; no other format
does. Vectors that are not finite are restored as not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}  # codes

DTYPES = ("float32", "bfloat16", "float16", *_LARGEST)
"""Names of the storage dtypes of a state; the last three have a scale per slot and head."""

_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # scales to try for int4, as fractions of the scale without clipping


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """Vectors of D numbers as codes and one scale each.

    Attributes:
      codes: [..., D] int8; or [..., D] uint8, the bits of float8_e4m3fn numbers; or [..., D / 2] uint8, two numbers of
        4 bits in each.
      scale: [...] uint16, the bits of a bfloat16 number; a vector is its codes times the scale. It is stored as bits
        because XLA's CPU backend lacks bfloat16: to write one slot it would convert a whole stack to float32 and back.
      dtype: one of the three quantised dtypes (static).
    """

    codes: Shaped[Array, "..."]
    scale: Shaped[Array, "..."]
    dtype: str = field(metadata={"static": True})


Stored = Array | Quantised
"""Vectors as a state stores them."""


def dtype_name(dtype: DTypeLike) -> str:
    """The name of one of `DTYPES`, given by name or as a dtype.

    Raises:
      ValueError: the dtype is not one of `DTYPES`.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"a state cannot be stored as {name}; known: {', '.join(DTYPES)}")
    return name


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Stored:
    """Zero-filled storage for vectors [..., D].

    Args:
      dtype: one of `DTYPES`, by name or as a dtype.

    Raises:
      ValueError: the dtype is not one of `DTYPES`, or D is odd for int4.
    """
    name, width = dtype_name(dtype), shape[-1]
    if name not in _LARGEST:
        return jnp.zeros(shape, name)
    if name == "int4":
        if width % 2:
            raise ValueError(f"int4 packs two numbers into a byte: the width of a head must be even, not {width}")
        width //= 2
    codes = jnp.zeros((*shape[:-1], width), jnp.int8 if name == "int8" else jnp.uint8)
    return Quantised(codes, jnp.zeros(shape[:-1], jnp.uint16), name)


def vector_bytes(width: int, dtype: DTypeLike) -> int:
    """The number of bytes of a vector of `width` numbers, including its scale."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: zeros((width,), dtype))))


def store_vectors(x: Float[Array, "... D"], like: Stored) -> Stored:
    """Vectors in the storage format of `like`.

    A quantised state is for inference: no gradient passes through it, so the stored vectors act as constants.
    """
    if isinstance(like, jax.Array):
        return x.astype(like.dtype)
    largest = _LARGEST[like.dtype]
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    step = jnp.abs(x).max(-1, keepdims=True) / largest
    # A bfloat16 scale is within 1/256 of the exact one, so the largest number lies between 126.5 and 127.5 steps of
    # int8 and rounds to 127: at most half a step is clipped, and the codes give the same scale again.
    scale = step.astype(jnp.bfloat16)
    if like.dtype == "int4":
        scale = _best(x / _divisor(step), step, largest)
    codes = jnp.clip(x / _divisor(scale.astype(jnp.float32)), -largest, largest)
    if like.dtype == "float8_e4m3fn":
        codes = jax.lax.bitcast_convert_type(codes.astype(jnp.float8_e4m3fn), jnp.uint8)
    else:
        codes = jnp.round(codes).astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(scale[..., 0], jnp.uint16)
    return Quantised(_pack(codes) if like.dtype == "int4" else codes, bits, like.dtype)


def _divisor(scale: Float[Array, "... 1"]) -> Float[Array, "... 1"]:
    return jnp.where(scale > 0, scale, 1)


def _best(steps: Float[Array, "... D"], step: Float[Array, "... 1"], largest: float) -> Shaped[Array, "... 1"]:
    """The scale with the least squared error, for numbers given in units of a step."""

    def attempt(before: tuple[Array, Array], part: Array) -> tuple[tuple[Array, Array], None]:
        best, least = before
        scale = (step * part).astype(jnp.bfloat16)
        of_step = scale.astype(jnp.float32) / _divisor(step)
        rounded = jnp.clip(jnp.round(steps / _divisor(of_step)), -largest, largest) * of_step
        error = jnp.square(rounded - steps).sum(-1, keepdims=True)
        return (jnp.where(error < least, scale, best), jnp.minimum(error, least)), None

    nothing = step.astype(jnp.bfloat16), jnp.full_like(step, jnp.inf)
    # A long prompt uses a loop, since unrolling would copy it for each attempt; the tokens of a step use no loop.
    return jax.lax.scan(attempt, nothing, jnp.array(_CLIPPED), unroll=steps.size < 2**20)[0][0]


def parts(stored: Stored) -> tuple[tuple[Array, ...], Array | None]:
    """Numbers to multiply, and the scale to apply to each vector's products; None if not quantised.

    The numbers are one array [..., D], or two [..., D / 2] with the first and the second half of each vector: two
    smaller products cost less than joining the halves. Products are scaled after summation, which costs one
    multiplication per slot instead of D.
    """
    if isinstance(stored, jax.Array):
        return (stored,), None
    scale = jax.lax.bitcast_convert_type(stored.scale.astype(jnp.uint32) << 16, jnp.float32)
    if stored.dtype == "float8_e4m3fn":
        return (_as_float16(stored.codes).astype(jnp.float32),), scale * 256
    codes = _unpack(stored.codes) if stored.dtype == "int4" else (stored.codes,)
    return tuple(x.astype(jnp.float32) for x in codes), scale


def split(stored: Stored) -> tuple[Float[Array, "... D"], Array | None]:
    """As `parts`, but with the numbers as one array."""
    numbers, scale = parts(stored)
    return numbers[0] if len(numbers) == 1 else jnp.concatenate(numbers, axis=-1), scale


def load_vectors(stored: Stored) -> Float[Array, "... D"]:
    """The vectors: float32 if they were quantised, else unchanged."""
    numbers, scale = split(stored)
    return numbers if scale is None else numbers * scale[..., None]


def _as_float16(bits: Shaped[Array, "... D"]) -> Float[Array, "... D"]:
    """Bits of float8_e4m3fn numbers -> the numbers / 256. Sign, exponent and fraction move to their places in float16,
    whose exponents are larger by 8. One shift handles many numbers at once; a conversion handles them one by one."""
    bits = bits.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)


def _pack(codes: Shaped[Array, "... D"]) -> Shaped[Array, "..."]:
    """Packs numbers -8..7 in pairs, the first half of a vector in the low bits."""
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=-1)
    return low | (high << 4)


def _unpack(packed: Shaped[Array, "... H"]) -> tuple[Shaped[Array, "... H"], Shaped[Array, "... H"]]:
    return (packed & 15).astype(jnp.int8) - 8, (packed >> 4).astype(jnp.int8) - 8
