"""Between the sets of a policy and single kv heads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress.policies.cache_view import Absorbed, CacheView, Evicted, LayerContext
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.summary import Summary
from jaxcompress.state.kv_state import Stats


class PerHead(NamedTuple):
    """A policy's arrays for single kv heads, and back.

    Heads that share a set may merge a token into different targets, so a reduction has numbers per head: [B, 1, N, K].
    Where every head has a set, and in a pool, they are [B, P, N].
    """

    policy: Policy

    def count(self, held: CacheView) -> int:
        """K of the layer, in a pool too."""
        return held.context.heads[1] if self.policy.scope == "pool" else held.keys.shape[1]

    def positions(self, incoming: CacheView) -> Array:
        """[B, P, T] -> [B, K, T]; in a pool, where every token has one head, as they are."""
        if self.policy.scope == "pool":
            return incoming.positions
        return jnp.broadcast_to(incoming.positions, incoming.keys.shape[:3])

    def numbers(self, stats: Stats) -> Stats:
        """[B, P, N, ...] -> [B, K, N]; in a pool [B, 1, N]."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1)[:, :, 0], stats) if self.policy.scope == "layer" else stats

    def pack(self, numbers: Stats) -> Stats:
        """Back again."""
        if self.policy.scope != "layer":
            return numbers
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, -1)[:, None], numbers)

    def split(self, held: CacheView) -> CacheView:
        """Every head with positions of its own. In a pool, keys and values of all are repeated for each head."""
        owner, k = held.owner, self.count(held)
        wide = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))
        positions = wide(held.positions)
        context = held.context
        if owner is not None:
            positions = jnp.where(owner == jnp.arange(k)[:, None], positions, -1)
            context = context._replace(which=tuple(range(k)))
        keys, values = (wide(x.astype(jnp.float32)) for x in (held.keys, held.values))
        return held._replace(keys=keys, values=values, positions=positions, owner=None, context=context)

    def split_gone(self, gone: Evicted, context: LayerContext) -> Evicted:
        """The same for tokens that were evicted."""
        k = context.heads[1] if gone.owner is not None else gone.keys.shape[1]
        wide = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))
        positions = wide(gone.positions)
        if gone.owner is not None:
            positions = jnp.where(gone.owner == jnp.arange(k)[:, None], positions, -1)
        keys, values = (wide(x.astype(jnp.float32)) for x in (gone.keys, gone.values))
        return Evicted(keys, values, positions, jax.tree.map(wide, self.numbers(gone.stats[1])))

    def join(self, done: Absorbed, positions: Array) -> tuple[Array, Array, Stats]:
        """Values, what changed and numbers, as the policy has them."""
        if self.policy.scope != "pool":
            return done.values, done.changed, self.pack(done.stats)
        mine = positions >= 0  # each slot belongs to one head
        only = lambda x: jnp.where(mine.reshape(*mine.shape, *[1] * (x.ndim - 3)), x, 0).sum(1, keepdims=True)
        return only(done.values), (done.changed & mine).any(1, keepdims=True), jax.tree.map(only, done.stats)

    def shown(self, summary: Summary, context: LayerContext) -> Summary:
        """In a pool, where all queries look at the same slots: each at the stand-ins of its own head."""
        if self.policy.scope != "pool":
            return summary
        b, k, m, d = summary.keys.shape
        own = jnp.arange(context.heads[0])[:, None] // context.group == jnp.arange(k * m) // m  # [H, K * M]
        bias = jnp.where(own, summary.bias.reshape(b, 1, 1, k * m), -jnp.inf)
        keys, values = (x.reshape(b, 1, k * m, d) for x in (summary.keys, summary.values))
        return summary._replace(keys=keys, values=values, bias=bias)
