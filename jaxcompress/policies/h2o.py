"""H2O: heavy hitters (Zhang et al. 2023, "H2O: Heavy-Hitter Oracle")."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, Observation, Scope
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.protect import protected
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


@policy
class H2O(Policy):
    """Keeps the most recent tokens and, of the others, those that received most attention so far.

        score[n] = sum over queries q so far of p(q -> n)
        score[n] = +inf for the `recent` newest tokens

    p is the attention probability. A token's own query counts. In a one-shot prompt, early tokens are seen by more
    queries and collect more.

    Attributes:
      recent: how many of the newest tokens are protected: a number of tokens (int), or a share of what stays
        (float, rounded down; 0.5 is the paper's 1:1 of heavy and recent).
      scope: "query_head" is the authors' code that drops tokens (`h2o_hf/utils_real_drop`): one set per query head, in
        a state of as many heads. "kv_head" and "layer" average over the heads that share a set; "layer" is the variant
        of Oren et al. 2024, table 3.

    Raises:
      ValueError: a negative number of tokens, or a share outside 0..1.
    """

    label = "h2o"

    recent: float | int = 0.5
    scope: Scope = "query_head"

    def check(self) -> None:
        share = isinstance(self.recent, float)
        if isinstance(self.recent, bool) or not 0 <= self.recent <= (1.0 if share else float("inf")):
            raise ValueError(f"recent must be a number of tokens >= 0 or a share in 0.0..1.0, not {self.recent!r}")

    def shields(self, capacity: int) -> tuple[int, int]:
        return 0, self.protected(capacity)

    def protected(self, capacity: int) -> int:
        """How many of the newest tokens never go, of so many that stay."""
        return self.recent if isinstance(self.recent, int) else int(round(self.recent * capacity, 6))

    def init(self, incoming: CacheView) -> Stats:
        return jnp.zeros_like(incoming.positions, jnp.float32)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return stats + seen.total(self.scope)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return protected(stats, held, recent=self.protected(held.per_set))

    def rule(self, capacity: int) -> EvictionRule | None:
        return None if self.scope == "pool" else EvictionRule("sum", recent=self.protected(capacity))
