"""Tokens that never go: their score is +inf."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.policies.policy import policy
from jaxcompress.policies.shields import union
from jaxcompress.policies.wrapper import check_shields, wrapper
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


def protected(scores: SlotScores, held: CacheView, *, first: int = 0, recent: int = 0) -> SlotScores:
    """The scores, +inf for the `first` tokens of the sequence and the `recent` newest ones; either may be 0."""
    return jnp.where(held.among(first, recent), jnp.inf, scores)


@policy
class protect(wrapper):
    """Never evicts the `first` tokens of the sequence nor the `recent` newest ones.

    Tokens that the policy inside chooses for sure (`critical`, `adaptive`, `NACL`) give way to these.

    Raises:
      ValueError: negative numbers, more tokens than `once` keeps, or a policy that never evicts.
    """

    first: int = 0
    recent: int = 0

    def check(self) -> None:
        super().check()
        if self.first < 0 or self.recent < 0:
            raise ValueError(f"first and recent must be 0 or more, not {self.first} and {self.recent}")
        check_shields(self)

    def shields(self, capacity: int) -> tuple[int, int]:
        return union(self.policy.shields(capacity), (self.first, self.recent))

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return protected(self.policy.score(stats, held), held, first=self.first, recent=self.recent)

    def rule(self, capacity: int) -> EvictionRule | None:
        base = self.policy.rule(capacity)
        return base and base._replace(first=max(base.first, self.first), recent=max(base.recent, self.recent))
