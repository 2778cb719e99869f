"""TOVA: token omission via attention (Oren et al. 2024, "Transformers are Multi-State RNNs")."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp

from jaxcompress.pallas_kernels.contract import Rule
from jaxcompress.policies.policy import Candidates, Observation, Policy, Scope
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Stats


@cache
def tova(scope: Scope = "layer") -> Policy:
    """Keeps the tokens to which the newest query attends most (section 4).

    score[n] = mean over heads of the attention probability that the newest query gave token n. Nothing is
    protected: neither the first tokens nor the newest one, which may be dropped at once.

    scope="layer" is the published method: the mean goes over all query heads of the layer, which share one set.
    "kv_head" and "query_head" select per head, the ablation of appendix A (worse there).
    """

    def init(incoming: Candidates) -> Stats:
        return jnp.zeros_like(incoming.positions, jnp.float32)

    def observe(stats: Stats, seen: Observation) -> Stats:
        row, present = seen.last(seen.per_set(scope))
        return jnp.where(present, row, stats)

    def score(stats: Stats, held: Candidates) -> SlotScores:
        return stats

    policy = Policy("tova" if scope == "layer" else f"tova-{scope}", score, init, observe, scope=scope)
    return policy.follow(lambda capacity: Rule("last"))
