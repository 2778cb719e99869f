"""Scores smoothed over neighbouring tokens, so that what is kept comes in readable pieces (Li et al. 2024, SnapKV)."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.policies.order import by_age, shift
from jaxcompress.policies.policy import policy
from jaxcompress.policies.wrapper import wrapper
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores

Pool = Literal["avg", "max"]


@policy
class pooled(wrapper):
    """Pools a policy's scores over `kernel` tokens that are neighbours among those held. Costs a sort.

    Protected tokens (+inf) stay protected and lend nothing to their neighbours.

    Raises:
      ValueError: an even kernel, or a policy that never evicts.
    """

    label = "pooled{kernel}"

    kernel: int = 5
    pool: Pool = "avg"

    def check(self) -> None:
        super().check()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, not {self.kernel}")

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats, held)
        protected = jnp.isposinf(scores)
        return jnp.where(protected, scores, neighbours(scores, held, ~protected, self.kernel, self.pool))


def neighbours(scores: SlotScores, held: CacheView, among: Bool[Array, "B P N"], kernel: int, pool: Pool) -> SlotScores:
    """The mean or maximum over `kernel` tokens around each by age, of those in `among` only.

    The mean counts what is missing as zeros, so that ends are penalised, as torch's avg_pool1d does, or as the lowest
    score where scores are negative; the maximum does not count it.
    """
    order = by_age(held)
    here = order.take(jnp.broadcast_to(among, scores.shape)) & order.occupied
    x = order.take(scores)
    if pool == "avg":
        fill = jnp.where(here & jnp.isfinite(x), x, 0.0).min(-1, keepdims=True, initial=0.0)
    else:
        fill = jnp.full((1, 1, 1), -jnp.inf)
    x = jnp.where(here, x, fill)
    head = order.owner.astype(jnp.float32)
    result = x
    for by in range(1, kernel // 2 + 1):
        for side in (by, -by):
            other = jnp.where(shift(head, side, -1.0) == head, shift(x, side, 0.0), fill)
            result = result + other if pool == "avg" else jnp.maximum(result, other)
    return order.put(result / kernel if pool == "avg" else result)
