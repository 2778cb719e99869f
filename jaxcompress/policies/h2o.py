"""H2O: heavy hitters (Zhang et al. 2023, "H2O: Heavy-Hitter Oracle")."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp

from jaxcompress.pallas_kernels.contract import Rule
from jaxcompress.policies.policy import Candidates, Observation, Policy, Scope, protect_newest
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Stats


@cache
def h2o(recent: float | int = 0.5, scope: Scope = "query_head") -> Policy:
    """Keeps the most recent tokens and, of the others, those that received most attention so far.

    score[n] = sum, over all queries so far, of the attention probability that they gave token n; +inf for the
    `recent` newest tokens. A token's own query counts, so that in a one-shot prompt early tokens collect more.

    Args:
      recent: how many of the newest tokens are protected: a number of tokens (int), or a share of the capacity
        (float, rounded down; 0.5 is the paper's 1:1 of heavy and recent).
      scope: "query_head" is the authors' code that really drops (`h2o_hf/utils_real_drop`): a set per query head, the
        state then has as many heads as there are query heads. "kv_head" and "layer" sum over the heads that share
        a set; "layer" is the variant of Oren et al. 2024, table 3.
    """
    if recent < 0 or (isinstance(recent, float) and recent > 1):
        raise ValueError(f"recent must be a number of tokens >= 0 or a share in 0.0..1.0, not {recent!r}")

    def init(incoming: Candidates) -> Stats:
        return jnp.zeros_like(incoming.positions, jnp.float32)

    def observe(stats: Stats, seen: Observation) -> Stats:
        return stats + seen.per_set(scope).sum(2)

    def newest(capacity: int) -> int:
        return recent if isinstance(recent, int) else int(round(recent * capacity, 6))

    def score(stats: Stats, held: Candidates) -> SlotScores:
        return protect_newest(stats, held, newest(held.per_set))

    needs = recent + 1 if isinstance(recent, int) else 1
    name = "h2o" if scope == "query_head" else f"h2o-{scope}"
    policy = Policy(name, score, init, observe, scope=scope, needs=needs)
    return policy.follow(lambda capacity: Rule("sum", recent=newest(capacity)))
