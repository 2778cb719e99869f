"""TOVA: token omission via attention (Oren et al. 2024, "Transformers are Multi-State RNNs")."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, Observation, Scope
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


@policy
class TOVA(Policy):
    """Keeps the tokens to which the newest query attends most (section 4).

        score[n] = mean over heads of p(newest query -> n)

    p is the attention probability. Nothing is protected: neither the first tokens nor the newest one, which may be
    dropped at once.

    Attributes:
      scope: "layer" is the published method: the mean goes over all query heads of the layer, which share one set.
        "kv_head" and "query_head" select per head, the ablation of appendix A (worse there).
    """

    label = "tova"

    scope: Scope = "layer"

    def init(self, incoming: CacheView) -> Stats:
        return jnp.zeros_like(incoming.positions, jnp.float32)

    watches = 1  # type: ignore[assignment]

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        row, present = seen.last(seen.per_set(self.scope))
        return jnp.where(present, row, stats)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return stats

    def rule(self, capacity: int) -> EvictionRule | None:
        return None if self.scope == "pool" else EvictionRule("last")
