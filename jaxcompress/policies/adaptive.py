"""AdaKV: heads share a layer's slots as their scores ask for (Feng et al. 2024, "Ada-KV")."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.policies.policy import policy
from jaxcompress.policies.wrapper import wrapper
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.order import rank_within
from jaxcompress.state.shapes import SlotScores


@policy
class adaptive(wrapper):
    """Lets the kv heads of a layer compete for one pool of slots, with a guaranteed share for each.

    The best `floor` * capacity tokens of every head are protected. The rest of the pool goes to the highest scores of
    all heads together. The pool has K * capacity slots, and a freed slot can take any head's next token, so slots that
    one head does not need serve another, in a batch too. Each query attends to the whole pool under a mask: attention
    reads as many bytes as without a pool, and computes K times as many products.

    Attributes:
      policy: of scope "pool", e.g. `SnapKV(scope="pool")`.
      floor: the guaranteed part of an even share, as in kvpress; the authors blend an even and an adaptive split.

    Raises:
      ValueError: a policy of another scope, or a floor outside 0..1.
    """

    floor: float | int = 0.2

    def check(self) -> None:
        super().check()
        if self.policy.scope != "pool":
            raise ValueError(
                f'adaptive needs a policy of scope "pool"; {self.policy.name} has scope {self.policy.scope!r}'
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in 0..1, not {self.floor}")

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats, held)
        heads = held.context.heads[1]
        safe = int(round(held.capacity // heads * self.floor, 6))
        return jnp.where(_rank_in_head(scores, held) < safe, jnp.inf, scores)


def _rank_in_head(scores: SlotScores, held: CacheView) -> Int[Array, "B P N"]:
    """How many tokens of its own head are better; free slots belong to no head."""
    assert held.owner is not None
    owner = jnp.where(held.occupied, held.owner, held.context.heads[1])
    return rank_within(owner, -scores.astype(jnp.float32), held.positions)
