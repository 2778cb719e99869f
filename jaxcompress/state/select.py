"""keep: from scores to the set that stays.

One rule for the whole library: higher scores stay; on an exact tie the older token stays; free slots are never
chosen. A score of +inf protects. Scores are compared in float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxcompress.state.order import NEVER, age_key, order_by, rank_of
from jaxcompress.state.shapes import SlotPositions, SlotScores


def rank(scores: SlotScores, positions: SlotPositions) -> Int[Array, "B P N"]:
    """How many tokens of its set are better than each; free slots come last.

    Args:
      scores: [..., N].
      positions: [..., N], -1 for a free slot.
    """
    worst_last = jnp.where(positions >= 0, -_comparable(scores), jnp.inf)
    return rank_of(order_by(worst_last, age_key(positions)))


def keep_top(scores: SlotScores, positions: SlotPositions, n: Int[Array, "..."] | int) -> Bool[Array, "B P N"]:
    """Marks the n tokens of each set that stay; all of them where there are no more than n.

    Args:
      scores: [..., N].
      positions: [..., N], -1 for a free slot.
      n: how many, one number or one per set.
    """
    return (positions >= 0) & (rank(scores, positions) < jnp.asarray(n)[..., None])


def worst(scores: SlotScores, positions: SlotPositions, spare: int = 0) -> Int[Array, "B P"]:
    """The slot to free in each set: the lowest score, the youngest on a tie; a free slot if more than `spare` are free.

    Two reductions, no sort. Freeing a free slot is a no-op, so occupancy is counted only when spare slots exist.
    """
    occupied = positions >= 0
    of_free, youth_of_free = -jnp.inf, jnp.asarray(NEVER)
    if spare:
        room = (~occupied).sum(-1, keepdims=True) > spare
        of_free, youth_of_free = jnp.where(room, -jnp.inf, jnp.inf), jnp.where(room, NEVER, -1)
    candidate = jnp.where(occupied, _comparable(scores), of_free)
    youth = jnp.where(occupied, positions, youth_of_free)
    return jnp.where(candidate == candidate.min(-1, keepdims=True), youth, -1).argmax(-1)


def unranked(scores: SlotScores, positions: SlotPositions) -> Bool[Array, "B P"]:
    """Marks the sets whose scores are all NaN: no score says what should stay."""
    return (jnp.isnan(scores) | (positions < 0)).all(-1) & (positions >= 0).any(-1)


def _comparable(scores: SlotScores) -> SlotScores:
    """float32, with NaN as the lowest score, so that the order is total."""
    scores = scores.astype(jnp.float32)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)
