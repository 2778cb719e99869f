"""The attention of the last w queries, kept exactly however tokens arrive: a ring of w numbers per slot."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, Observation, Scope
from jaxcompress.policies.policy import Policy

Ring = Float[Array, "B P N w"]


def empty_ring(incoming: CacheView, window: int) -> Ring:
    """[B, P, T, w] of zeros."""
    return jnp.zeros((*incoming.positions.shape, window), jnp.float32)


def record(ring: Ring, seen: Observation, scope: Scope) -> Ring:
    """Writes each query's probabilities over those of the query w before it; zeros for queries that are not watched."""
    window, queries = ring.shape[-1], seen.queries
    column = jnp.arange(window)
    last = queries > queries.max(-1, keepdims=True) - window
    mine = ((queries % window)[..., None] == column) & (last & (queries >= 0))[..., None]  # [B, T, w]
    if seen.every is not None:
        newest = queries.max(-1, keepdims=True)
        latest = newest - (newest - column) % window  # the query whose column it is
        ring = jnp.where(((newest >= 0) & (latest % seen.every != 0))[:, None, None], 0.0, ring)
    if queries.shape[1] == 1:
        new = seen.per_set(scope)[:, :, 0, :, None]
    else:
        new = jnp.einsum("bptn,btw->bpnw", seen.per_set(scope), mine.astype(jnp.float32), precision="highest")
    return jnp.where(mine.any(1)[:, None, None], new, ring)


class RecentQueries(Policy):
    """The base of policies whose stats are the attention of the last `window` queries, and which protect these tokens.

    Attributes:
      window: how many queries; a field of the policy.
    """

    window: int

    def shields(self, capacity: int) -> tuple[int, int]:
        return 0, self.window

    @property
    def watches(self) -> int | None:
        return self.window

    def init(self, incoming: CacheView) -> Ring:
        return empty_ring(incoming, self.window)

    def observe(self, stats: Ring, seen: Observation) -> Ring:
        return record(stats, seen, self.scope)
