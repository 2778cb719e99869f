"""Functions that the TPU kernels share: reading stored numbers and writing one slot.

Memory on a TPU is tiled in groups of 8 rows, or 32 rows for an 8-bit array. A copy between HBM and VMEM starts and ends
at a group boundary. To write one slot, its group is changed in VMEM and copied as a whole. Arrays are padded to 8 rows,
except in an interpreter, where the last group has only the remaining rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from jaxcompress.pallas_kernels.tpu_limits import QUANTISED
from jaxcompress.state.storage import Stored

MASKED = -1e30  # as in `jaxcompress.recurrence.attention`
LANES = 128


def in_hbm(x: Array, interpret: Any) -> Array:
    """Prevents XLA from copying a state that fits into VMEM there and back around each kernel."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def multiply_dtype(query: str, stored: str) -> Any:
    """The dtype for products of queries and keys: codes are exact in bfloat16."""
    return jnp.promote_types(query, jnp.bfloat16 if stored in QUANTISED else stored)


def as_numbers(codes: Shaped[Array, "N D"], stored: str, dtype: Any) -> Float[Array, "N D"]:
    """The numbers to multiply; a quantised vector is these numbers times its scale (see `as_scale`)."""
    if stored == "float8_e4m3fn":
        bits = codes.astype(jnp.int32)
        exponent, fraction = (bits >> 3) & 15, bits & 7
        # A float8 number is an integer of at most 18 bits, with at most 4 significant bits, divided by 512.
        size = jnp.where(exponent == 0, fraction, (fraction + 8) << jnp.maximum(exponent - 1, 0))
        return jnp.where(bits >= 128, -size, size).astype(jnp.float32).astype(dtype)
    if stored == "int8":
        return codes.astype(jnp.float32).astype(dtype)
    return codes.astype(dtype)


def as_scale(bits: Shaped[Array, "1 N"], stored: str) -> Float[Array, "1 N"]:
    """The bits of bfloat16 numbers -> the scales of the vectors."""
    scale = jax.lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)
    return scale / 512 if stored == "float8_e4m3fn" else scale


class Place(NamedTuple):
    """A possible place of a slot in a tile: a group of rows.

    Attributes:
      here: whether the slot is in this group.
      start: first row of the group in the tile.
      size: number of rows in the group (static).
    """

    here: Any
    start: Any
    size: int


def places(slot: Int[Array, ""], first: Any, tile: int, slots: int, rows: int, padded: bool) -> Iterator[Place]:
    """The group of rows that holds `slot`, if the tile holds it. There are two candidates if the number of slots is no
    multiple of the group size and memory is not padded.

    Args:
      slot: index among all slots, `slots` for none.
      first: the first slot of the tile.
      tile: number of slots in the tile.
      rows: number of rows in a group.
    """
    local = slot - first
    inside = (local >= 0) & (local < tile) & (slot < slots)
    start = pl.multiple_of(jnp.clip(local, 0, tile - 1) // rows * rows, rows)
    whole = slots // rows * rows
    if padded or whole == slots:
        yield Place(inside, start, rows)
        return
    if whole:
        last = (tile - rows) // rows * rows
        yield Place(inside & (slot < whole), pl.multiple_of(jnp.minimum(start, last), rows), rows)
    yield Place(inside & (slot >= whole), whole % tile, slots - whole)


def with_row(group: Shaped[Array, "R D"], row: Int[Array, ""], new: Shaped[Array, "1 D"]) -> Shaped[Array, "R D"]:
    """The group with one of its rows replaced."""
    here = jax.lax.broadcasted_iota(jnp.int32, group.shape, 0) == row
    if group.dtype.itemsize < 4:  # masks have 32 bits
        wide = jnp.int32 if jnp.issubdtype(group.dtype, jnp.integer) else jnp.float32
        return jnp.where(here, new.astype(wide), group.astype(wide)).astype(group.dtype)
    return jnp.where(here, new, group)


def each(places: Iterator[Place], do: Callable[[Place], None]) -> None:
    """Calls `do` for the place that holds the slot."""
    for place in places:
        pl.when(place.here)(lambda place=place: do(place))


def product(a: Array, b: Array, axis: int) -> Array:
    """a [G, D] by b [N, D] (axis 1), or a [G, N] by b [N, D] (axis 0), float32."""
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def nbytes(*arrays: Stored) -> int:
    """The total number of bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
