"""What the TPU kernels share: how stored numbers are read, and how one slot is written.

Memory on a TPU is tiled: 8 rows go together, of an 8-bit array 32, and a copy between HBM and VMEM starts and ends with
such a group. To write one slot, the group around it is changed in VMEM and copied whole. Arrays are padded to 8 rows;
those of an interpreter are not, and there the last group has as many rows as there are.
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
    """Keeps XLA from moving a state that would fit into VMEM there and back around each kernel."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def multiply_dtype(query: str, stored: str) -> Any:
    """What queries and keys are multiplied in: codes are exact in bfloat16."""
    return jnp.promote_types(query, jnp.bfloat16 if stored in QUANTISED else stored)


def as_numbers(codes: Shaped[Array, "N D"], stored: str, dtype: Any) -> Float[Array, "N D"]:
    """What to multiply with; a quantised vector is that times its scale (see `as_scale`)."""
    if stored == "float8_e4m3fn":
        bits = codes.astype(jnp.int32)
        exponent, fraction = (bits >> 3) & 15, bits & 7
        # A float8 is an integer of at most 18 bits, of which 4 are not zero, over 512.
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
    """Where a slot of a tile may lie: a group of rows in the tile.

    Attributes:
      here: whether it lies there.
      start: first row of the group in the tile.
      size: its rows (static).
    """

    here: Any
    start: Any
    size: int


def places(slot: Int[Array, ""], first: Any, tile: int, slots: int, rows: int, padded: bool) -> Iterator[Place]:
    """The group of rows that holds `slot`, if the tile does. Two to choose from where groups do not fill the slots and
    memory is not padded.

    Args:
      slot: which of all slots, `slots` for none.
      first: the first slot of the tile.
      tile: its slots.
      rows: of a group.
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
    if group.dtype.itemsize < 4:  # masks are of 32 bits
        wide = jnp.int32 if jnp.issubdtype(group.dtype, jnp.integer) else jnp.float32
        return jnp.where(here, new.astype(wide), group.astype(wide)).astype(group.dtype)
    return jnp.where(here, new, group)


def each(places: Iterator[Place], do: Callable[[Place], None]) -> None:
    """Does something for the place that is here."""
    for place in places:
        pl.when(place.here)(lambda place=place: do(place))


def product(a: Array, b: Array, axis: int) -> Array:
    """a [G, D] by b [N, D] (axis 1), or a [G, N] by b [N, D] (axis 0), float32."""
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def nbytes(*arrays: Stored) -> int:
    """Of all together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
