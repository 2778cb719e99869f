"""NACL: eviction by proxy tokens and by chance (Chen et al. 2024)."""

from __future__ import annotations

from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress.policies.draws import per_token
from jaxcompress.policies.policy import Candidates, Observation, Policy, protect_newest
from jaxcompress.policies.recent_queries import Ring, empty_ring, record
from jaxcompress.select import keep_top
from jaxcompress.shapes import SlotScores


@cache
def nacl(
    proxies: int = 8, sinks: int = 4, recent: int = 8, chance: float = 0.37, seed: int = 0,
    scope: Literal["layer", "kv_head", "query_head"] = "kv_head",
) -> Policy:  # fmt: skip
    """Keeps first and newest tokens, the best by attention from the last queries, and a random draw of the rest.

    Proxy tokens are the last `proxies` queries; score[n] = the probability that they gave token n, summed. Of the slots
    left by `sinks` and `recent`, the share `chance` is drawn without replacement with probabilities softmax(score),
    which is what the top of score + Gumbel noise is; the others go to the highest scores. In the paper's code 0.07 of
    0.19 of the tokens are drawn. There proxies also see tokens after them; here attention is causal.

    Raises:
      ValueError: fewer than 1 proxy, negative counts, or a share outside 0..1.
    """
    if proxies < 1 or sinks < 0 or recent < 0 or not 0 <= chance <= 1:
        raise ValueError(
            "nacl needs proxies >= 1, sinks and recent >= 0 and chance in 0..1, "
            f"not {proxies=}, {sinks=}, {recent=}, {chance=}"
        )

    def init(incoming: Candidates) -> Ring:
        return empty_ring(incoming, proxies)

    def observe(ring: Ring, seen: Observation) -> Ring:
        return record(ring, seen, scope)

    def score(ring: Ring, held: Candidates) -> SlotScores:
        scores = ring.sum(-1)
        room = held.capacity - sinks - recent
        best = room - int(round(room * chance, 6))
        safe = protect_newest(jnp.where(held.positions < sinks, jnp.inf, 0.0), held, recent)
        inside = jnp.where(jnp.isposinf(safe), -1, held.positions)
        sure = keep_top(scores, inside, best)
        drawn = scores + per_token(seed, held, jax.random.gumbel)
        return jnp.where(sure | jnp.isposinf(safe), jnp.inf, drawn)

    return Policy("nacl", score, init, observe, scope=scope, needs=sinks + recent + 1)
