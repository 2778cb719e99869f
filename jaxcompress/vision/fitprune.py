"""FitPrune: drops patches in every layer; the numbers are fitted offline to change attention least (Ye et al. 2025).

At run time, layer l drops the n_l patches with the smallest product of attention from the text and attention from
other patches (maximum over heads). The numbers n_l come from a bisection on one threshold over calibration prompts
(`fit`). `RECIPES` has the authors' numbers for LLaVA-1.5-7B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcompress.vision.choose import ranking

RECIPES: dict[int, tuple[int, ...]] = {
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}
"""Patches (of 576) dropped in each of 32 layers, keyed by the percentage of FLOPs saved."""


def cross_attention(rows: Float[Array, "B H R V"], present: Bool[Array, "B R"]) -> Float[Array, "B V"]:
    """Attention to each patch from the text after the picture: maximum over heads, sum over words."""
    return jnp.where(present[..., None], rows.max(1), 0.0).sum(1)


def self_attention(rows: Float[Array, "B H V V"], present: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Attention to each patch from all patches: maximum over heads, mean over patches."""
    return jnp.where(present[..., None], rows.max(1), 0.0).sum(1) / jnp.maximum(present.sum(1), 1)[:, None]


def importance(cross: Float[Array, "B V"], own: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Scores: the product of cross and self attention."""
    return cross * own


def lowest_first(scores: Float[Array, "B V"]) -> Array:
    """[B, V], the order in which patches go; of equal scores, the later patch goes first."""
    return ranking(scores)[:, ::-1]


def removable(mass: Float[np.ndarray, " V"], total: float, alpha: float) -> np.ndarray:
    """The patches with the least mass that may go while at most a share alpha of `total` is lost, minus one patch.

    `total` is the mass of the whole picture in this layer; the mass of patches dropped earlier counts as lost. Like the
    authors' code, this stops one patch before the bound.
    """
    order = np.argsort(mass, kind="stable")
    left = mass.sum() - np.concatenate([[0.0], np.cumsum(mass[order])])[: len(mass)]
    over = np.flatnonzero(left < total * (1 - alpha))
    n = max(int(over[0]) - 1, 0) if len(over) else len(mass)
    return order[:n]


def fit(
    run: Callable[[float], tuple[float, Sequence[float]]], flops: float, *, tolerance: float = 0.01
) -> tuple[tuple[int, ...], float]:
    """The smallest threshold alpha that keeps a model within a number of FLOPs, and the patches dropped per layer.

    Uses bisection on alpha in 0..1 (algorithm 1).

    Args:
      run: (alpha) -> (FLOPs of a calibration prompt, mean number of patches dropped in each layer). Dropped patches are
        those that `removable` allows in both cross and self attention.
      flops: target.
      tolerance: tolerance on alpha.

    Raises:
      ValueError: the target is not met even if all removable patches go.
    """
    low, high = 0.0, 1.0
    spent, leaves = run(high)
    if spent > flops:
        raise ValueError(f"no threshold saves enough: {spent:.4g} FLOPs are left, the target is {flops:.4g}")
    while high - low > tolerance + 1e-6:
        middle = (low + high) / 2
        spent, found = run(middle)
        if spent <= flops:
            high, leaves = middle, found
        else:
            low = middle
    return tuple(int(n) for n in leaves), high


def removable_both(
    cross: Float[np.ndarray, " V"], own: Float[np.ndarray, " V"], totals: tuple[float, float], alpha: float
) -> np.ndarray:
    """The patches that may go by both cross and self attention, ascending."""
    return np.intersect1d(removable(cross, totals[0], alpha), removable(own, totals[1], alpha))
