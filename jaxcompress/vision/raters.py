"""Which words rate, from the embeddings of a prompt (SparseVLM)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.vision.choose import standing, take
from jaxcompress.vision.sparsevlm import rater_mass, raters


def rating(block: HiddenBlock, words: int) -> Bool[Array, "B W"]:
    """The words after the picture that it is more like than the mean.

    Args:
      block: before the first layer.
      words: how many tokens of a row are no visual ones.
    """
    total = block.patch.shape[1]
    patches, others = standing(block.patch >= 0, total - words), standing(block.patch < 0, words)
    seen = take((block.patch >= 0) & (block.positions >= 0), patches)
    last = jnp.where(seen, patches, -1).max(1, keepdims=True)
    after = take(block.positions >= 0, others) & (others > last)
    mass = rater_mass(take(block.hidden, patches), take(block.hidden, others), seen, after)
    return raters(mass, after)
