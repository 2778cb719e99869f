"""DART: keeps a few pivots and the patches least similar to them, so duplicates go (Wen et al. 2025).

Pivots are the patches and words whose keys have the largest L1 norms, four of each. In turn, every pivot
keeps those of the remaining patches that are least similar to it by the cosine of hidden states. No attention map is
needed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.vision.choose import check_budget, cosine, indices_of, ranked_indices, take, top_mask

LAYER, PIVOTS = 2, 4
"""Layer before which patches leave; number of pivots among the patches, and among the words."""


class Dart(NamedTuple):
    """Result of `dart`.

    Attributes:
      kept: [B, n], ascending.
      pivots: [B, p], patches that are pivots.
    """

    kept: Int[Array, "B n"]
    pivots: Int[Array, "B p"]


def dart(
    patches: Float[Array, "B V E"],
    words: Float[Array, "B R E"],
    patch_norm: Float[Array, "B V"],
    word_norm: Float[Array, "B R"],
    present: Bool[Array, "B R"],
    n: int,
    *,
    pivots: int = PIVOTS,
    there: Bool[Array, "B V"] | None = None,
) -> Dart:
    """Keeps exactly n patches.

    In the released code every pivot takes the same number, so about n patches stay. Here the first pivots take one more
    if n does not divide evenly. Pivots are in the order of their norms, patches before words.

    Args:
      patches, words: hidden states.
      patch_norm, word_norm: L1 norms of the keys, heads concatenated.
      present: which words are present.
      there: which patches are no empty places; all by default. Empty places are taken last.

    Raises:
      ValueError: n above V.
    """
    total = patches.shape[1]
    check_budget(n, total, "patches")
    own = min(pivots, n)
    there = jnp.ones(patch_norm.shape, bool) if there is None else there
    patch_norm = jnp.where(there, patch_norm, -jnp.inf)
    chosen = ranked_indices(patch_norm, own)
    word_norm = jnp.where(present, word_norm, -jnp.inf)
    asking = ranked_indices(word_norm, min(pivots, words.shape[1]))
    counts = jnp.concatenate([jnp.ones_like(chosen, bool), take(present, asking)], axis=1)
    pivot = jnp.concatenate([take(patches, chosen), take(words, asking)], axis=1)
    unlike = jnp.where(there[:, None], -cosine(pivot, patches), -jnp.inf)
    rows = jnp.arange(patches.shape[0])[:, None]
    kept = jnp.zeros(patch_norm.shape, bool).at[rows, chosen].set(True)
    many = counts.sum(1)
    quota, more = (n - own) // many, (n - own) % many
    nth = jnp.cumsum(counts, axis=1) - 1
    for i in range(pivot.shape[1]):
        take_now = jnp.where(counts[:, i], quota + (nth[:, i] < more), 0)
        kept |= top_mask(unlike[:, i], take_now, ~kept)
    return Dart(indices_of(kept, n), chosen)
