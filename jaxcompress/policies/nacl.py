"""NACL: eviction by proxy tokens and by chance (Chen et al. 2024)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.draws import per_token
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.protect import protected
from jaxcompress.policies.recent_queries import Ring, empty_ring, record
from jaxcompress.state.select import keep_top
from jaxcompress.state.shapes import SlotScores


@policy
class NACL(Policy):
    """Keeps first and newest tokens, the best by attention from the last queries, and a random draw of the rest.

        score[n] = sum over the last `proxies` queries q of p(q -> n)
        score[n] = +inf for the `sinks` first and the `recent` newest tokens

    p is the attention probability. Of the slots that are left, the share `chance` is drawn without replacement with
    probabilities softmax(score), as the top of score + Gumbel noise; the others go to the highest scores. The paper's
    code draws 0.07 / 0.19 of them. There proxies also see tokens after them; here attention is causal.

    Raises:
      ValueError: fewer than 1 proxy, negative counts, or a share outside 0..1.
    """

    label = "nacl"

    proxies: int = 8
    sinks: int = 4
    recent: int = 8
    chance: float | int = 0.37
    seed: int = 0
    scope: Literal["layer", "kv_head", "query_head"] = "kv_head"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen

    def check(self) -> None:
        if self.proxies < 1 or self.sinks < 0 or self.recent < 0 or not 0 <= self.chance <= 1:
            raise ValueError(f"nacl needs proxies >= 1, sinks and recent >= 0 and chance in 0..1, not {self}")

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.sinks, self.recent

    @property
    def watches(self) -> int | None:
        return self.proxies

    def init(self, incoming: CacheView) -> Ring:
        return empty_ring(incoming, self.proxies)

    def observe(self, stats: Ring, seen: Observation) -> Ring:
        return record(stats, seen, self.scope)

    def score(self, stats: Ring, held: CacheView) -> SlotScores:
        scores = stats.sum(-1)
        room = held.capacity - self.sinks - self.recent
        best = room - int(round(room * self.chance, 6))
        safe = protected(jnp.zeros_like(scores), held, first=self.sinks, recent=self.recent)
        inside = jnp.where(jnp.isposinf(safe), -1, held.positions)
        sure = keep_top(scores, inside, best)
        drawn = scores + per_token(self.seed, held, jax.random.gumbel)
        return jnp.where(sure | jnp.isposinf(safe), jnp.inf, drawn)
