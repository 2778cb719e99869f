"""keep: selects the kept set from scores.

`best_first` states the one rule of the whole library: a higher score stays; on an exact tie the older element stays;
free slots are never chosen. A score of +inf protects. NaN counts as -inf, and both are chosen last. Scores are compared
in float32. The rule applies to slots of a KV state on the device, and to words of a prompt on the host (`xp=np`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.order import NEVER, first_by, rank_of
from jaxcompress.state.shapes import SlotPositions, SlotScores


def best_first(
    scores: Float[Array | np.ndarray, "*sets N"], positions: Int[Array | np.ndarray, "*sets N"], xp: ModuleType = jnp
) -> Int[Array | np.ndarray, "*sets N"]:
    """The elements of each set from the best to the worst, as indices; free slots come last.

    Args:
      scores: [..., N]. XLA takes subnormal numbers for 0 on some devices; NumPy does not.
      positions: [..., N], position in the sequence, -1 for a free slot.
      xp: the array module: `jax.numpy`, or `numpy` for arrays on the host, where a sort is faster than a device call.
    """
    occupied = positions >= 0
    worst_last = xp.where(occupied, -_comparable(scores, xp), xp.inf)
    age = xp.where(occupied, positions, NEVER)
    return xp.lexsort((age, worst_last))


def rank(scores: SlotScores, positions: SlotPositions) -> Int[Array, "B P N"]:
    """The number of elements in the same set that are better than each element; free slots come last.

    Args:
      scores: [..., N].
      positions: [..., N], -1 for a free slot.
    """
    return rank_of(jnp.asarray(best_first(scores, positions)))


def keep_top(scores: SlotScores, positions: SlotPositions, n: Int[Array, "..."] | int) -> Bool[Array, "B P N"]:
    """Marks the n tokens of each set that stay; all tokens if a set has at most n.

    Args:
      scores: [..., N].
      positions: [..., N], -1 for a free slot.
      n: the number of tokens to keep, one number or one per set.
    """
    return (positions >= 0) & (rank(scores, positions) < jnp.asarray(n)[..., None])


def worst(scores: SlotScores, positions: SlotPositions, spare: int = 0) -> Int[Array, "B P"]:
    """The slot of each set to free: a free one if more than `spare` are free, else the last one by `best_first`.

    Reductions instead of a sort. Freeing a free slot is a no-op, so occupancy is counted only when spare slots
    exist.
    """
    occupied = positions >= 0
    of_free, youth_of_free = -jnp.inf, jnp.asarray(NEVER)
    if spare:
        room = (~occupied).sum(-1, keepdims=True) > spare
        of_free, youth_of_free = jnp.where(room, -jnp.inf, jnp.inf), jnp.where(room, NEVER, -1)
    candidate = jnp.where(occupied, _comparable(scores, jnp), of_free)
    youth = jnp.where(occupied, positions, youth_of_free)
    return first_by(candidate, -youth)


def last_position(scores: SlotScores, positions: SlotPositions) -> Int[Array, "B P"]:
    """The position of the last token of each set by `best_first`, -1 in a set without tokens."""
    candidate = jnp.where(positions >= 0, _comparable(scores, jnp), jnp.inf)
    return jnp.take_along_axis(positions, first_by(candidate, -positions)[..., None], axis=-1)[..., 0]


def unranked(scores: SlotScores, positions: SlotPositions) -> Bool[Array, "B P"]:
    """Marks the sets whose scores are all NaN, so that they do not decide what stays."""
    return ~((positions >= 0) & ~jnp.isnan(scores)).any(-1) & (positions >= 0).any(-1)


def _comparable(scores: Any, xp: ModuleType) -> Any:
    """The scores in float32, with NaN replaced by the lowest score, so that the order is total."""
    scores = scores.astype(xp.float32)
    return xp.where(xp.isnan(scores), -xp.inf, scores)
