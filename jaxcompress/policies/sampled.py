"""Watching some queries only."""

from __future__ import annotations

from math import lcm

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.policy import policy
from jaxcompress.policies.protect import protected
from jaxcompress.policies.shields import union
from jaxcompress.policies.wrapper import check_shields, wrapper
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


@policy
class sampled(wrapper):
    """Watches only every n-th query of each sequence: an approximation that saves the bookkeeping of the others.

    The n newest tokens are protected, since nothing may have looked at them yet.

    Raises:
      ValueError: n below 1, more tokens than `once` keeps, or a policy that never evicts.
    """

    label = "sampled{n}"

    n: int

    def check(self) -> None:
        super().check()
        if self.n < 1:
            raise ValueError(f"sampled needs every 1st query or fewer, not every {self.n}th")
        check_shields(self)

    def shields(self, capacity: int) -> tuple[int, int]:
        return union(self.policy.shields(capacity), (0, self.n))

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        watched = (seen.queries >= 0) & (seen.queries % self.n == 0)
        queries = jnp.where(watched, seen.queries, -1)
        weights = jnp.where(watched[:, None, None, :, None], seen.weights, 0.0)
        every, present = lcm(self.n, seen.every or 1), seen.queries if seen.present is None else seen.present
        return self.policy.observe(stats, seen._replace(weights=weights, queries=queries, every=every, present=present))

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return protected(self.policy.score(stats, held), held, recent=self.n)
