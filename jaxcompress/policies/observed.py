"""Mean attention received (kvpress's "observed attention")."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp

from jaxcompress.policies.policy import Candidates, Observation, Policy, Scope
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Stats


@cache
def observed_attention(scope: Scope = "kv_head") -> Policy:
    """Keeps the tokens that received most attention per query that could see them.

    score[n] = sum of the probabilities given to token n / number of queries since it came, its own included. Unlike
    `h2o` nothing is protected, and old tokens have no advantage from having been seen more often.
    """

    def init(incoming: Candidates) -> Stats:
        return jnp.zeros_like(incoming.positions, jnp.float32)

    def observe(stats: Stats, seen: Observation) -> Stats:
        return stats + seen.per_set(scope).sum(2)

    def score(stats: Stats, held: Candidates) -> SlotScores:
        return stats / (held.newest - held.positions + 1)

    name = "observed_attention" if scope == "kv_head" else f"observed_attention-{scope}"
    return Policy(name, score, init, observe, scope=scope)
