"""Tokens by age, for scores that look at neighbours."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.state.order import NEVER, age_key, oldest_first, order_by


class ByAge(NamedTuple):
    """Candidates from the oldest to the newest, free ones last; in a pool head after head.

    Attributes:
      index: [B, P, N], the candidate at each rank.
      occupied: [B, P, N] bool, by rank.
      owner: [B, P, N] by rank, 0 where there is no pool.
    """

    index: Int[Array, "B P N"]  # pyright: ignore[reportIncompatibleMethodOverride]  nobody searches its fields
    occupied: Bool[Array, "B P N"]
    owner: Int[Array, "B P N"]

    def take(self, x: Array) -> Array:
        """[B, P or K, N, ...] in slots -> by rank."""
        index = jnp.broadcast_to(self.index, (*x.shape[:2], self.index.shape[-1]))
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=2)

    def put(self, x: Array) -> Array:
        """[B, P or K, N] by rank -> in slots."""
        index = jnp.broadcast_to(self.index, x.shape)
        return jnp.put_along_axis(jnp.zeros_like(x), index, x, axis=-1, inplace=False)


def by_age(held: CacheView) -> ByAge:
    """Sorts candidates by position."""
    if held.owner is None:
        index = oldest_first(held.positions)
        owner = jnp.zeros_like(index)
    else:
        head = jnp.where(held.occupied, held.owner, NEVER)
        index = order_by(head, age_key(held.positions))
        owner = jnp.take_along_axis(head, index, axis=-1)
    return ByAge(index, jnp.take_along_axis(held.occupied, index, axis=-1), owner)


def shift(x: Array, by: int, fill: float) -> Array:
    """x[..., i + by] at i, `fill` beyond the ends."""
    n = x.shape[-1]
    if abs(by) >= n:
        return jnp.full_like(x, fill)
    pad = [(0, 0)] * (x.ndim - 1)
    if by >= 0:
        return jnp.pad(x[..., by:], [*pad, (0, by)], constant_values=fill)
    return jnp.pad(x[..., :by], [*pad, (-by, 0)], constant_values=fill)
