"""Mean attention received (kvpress's "observed attention")."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, Observation, Scope
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


@policy
class ObservedAttention(Policy):
    """Keeps the tokens that received most attention per query that could see them.

        score[n] = sum over queries q since n came of p(q -> n) / number of these queries

    p is the attention probability; a token's own query counts. Unlike in `H2O`, nothing is protected, and old tokens
    gain nothing from having met more queries.
    """

    label = "observed_attention"

    scope: Scope = "kv_head"

    def init(self, incoming: CacheView) -> Stats:
        return jnp.zeros_like(incoming.positions, jnp.float32)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return stats + seen.total(self.scope)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return stats / (held.newest - held.positions + 1)
