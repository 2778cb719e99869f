"""Sorting along the last axis. Slots have no order of their own: code that needs an order sorts by position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.state.shapes import SlotPositions

NEVER = jnp.iinfo(jnp.int32).max
"""A number larger than any position."""


def order_by(*keys: Array) -> Int[Array, "*B N"]:
    """The indices that sort by the first key, ties by the next key, and ties in all keys by index.

    Args:
      keys: [..., N] each, of one shape.
    """
    index = jnp.broadcast_to(jnp.arange(keys[0].shape[-1], dtype=jnp.int32), keys[0].shape)
    return jax.lax.sort((*keys, index), dimension=-1, num_keys=len(keys))[-1]


def rank_of(order: Int[Array, "*B N"]) -> Int[Array, "*B N"]:
    """The rank of each entry, given the entry at each rank: the inverse of the permutation from `order_by`."""
    rank = jnp.broadcast_to(jnp.arange(order.shape[-1], dtype=order.dtype), order.shape)
    return jnp.put_along_axis(jnp.zeros_like(order), order, rank, axis=-1, inplace=False)


def rank_within(group: Int[Array, "*B N"], *keys: Array) -> Int[Array, "*B N"]:
    """The rank of each entry within its group; 0 is the first by the keys.

    Args:
      group: group numbers, 0 or more; entries with equal numbers are ranked together.
      keys: as for `order_by`.
    """
    order = order_by(group, *keys)
    begins = jnp.diff(jnp.take_along_axis(group, order, axis=-1), axis=-1, prepend=-1) != 0
    rank = jnp.broadcast_to(jnp.arange(group.shape[-1], dtype=jnp.int32), group.shape)
    start = jax.lax.cummax(jnp.where(begins, rank, 0), axis=group.ndim - 1)
    return jnp.put_along_axis(jnp.zeros_like(order), order, rank - start, axis=-1, inplace=False)


def first_by(key: Float[Array, "*B N"], then: Int[Array, "*B N"]) -> Int[Array, "*B"]:
    """The index of the entry that `order_by(key, then)` puts first. The key is float32 and not NaN.

    A compiler may compute the keys once for a minimum and once more for the comparison with it, and round differently:
    then none equals the minimum. So the entry that the search found counts, whatever the comparison says.
    """
    bits = jax.lax.bitcast_convert_type(key, jnp.int32)  # integers in the same order: a search among floats is slower
    found = jnp.where(bits < 0, bits ^ NEVER, bits).argmin(-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1)
    least = (key == jnp.take_along_axis(key, found, axis=-1)) | (index == found)
    return jnp.where(least, then, NEVER).argmin(-1)


def age_key(positions: SlotPositions) -> SlotPositions:
    """Positions with free slots (-1) after all others."""
    return jnp.where(positions >= 0, positions, NEVER)


def oldest_first(positions: SlotPositions) -> Int[Array, "*B N"]:
    """The indices that sort tokens from the oldest to the newest; free slots come last."""
    return order_by(age_key(positions))
