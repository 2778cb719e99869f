"""MustDrop, the prefilling stage: drops patches that neither the whole text nor any word attends to (section 3.3).

A is the attention from the text after the picture to the patches in one layer, averaged over heads:

  global g_j = sum_i A_ij      individual m_j = max_i A_ij
  patch j goes iff  g_j < G * sum_j g_j  and  m_j < I  and it is not a key token

The thresholds G and I are specific to a model, a number of patches and a length of text. `relevance` turns the rule
into an equivalent order, so that an exact number of patches can stay.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LAYERS = (2, 6, 10, 14)
"""Layers (of 32) after which patches are dropped, as published."""

THRESHOLDS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}
"""(G, I) for LLaVA-1.5-7B, keyed by the mean number of patches over its layers that stay of 576."""


def dual_attention(
    rows: Float[Array, "B H R V"], present: Bool[Array, "B R"], patches: Bool[Array, "B V"]
) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """Global attention as a share of its sum, and individual attention.

    Args:
      rows: attention probabilities of queries to patches.
      present: which queries are text after the picture.
      patches: which columns are patches; the others get 0.
    """
    mean = jnp.where(present[:, :, None] & patches[:, None], rows.mean(1), 0.0)
    total = mean.sum(1)
    return total / jnp.maximum(total.sum(-1, keepdims=True), 1e-30), mean.max(1)


def passes(
    share: Float[Array, "B V"], individual: Float[Array, "B V"], thresholds: tuple[float, float]
) -> Bool[Array, "B V"]:
    """Which patches the published rule keeps, without regard to key tokens."""
    return ~((share < thresholds[0]) & (individual < thresholds[1]))


def relevance(share: Float[Array, "B V"], individual: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """A score whose best n patches are those that pass for some pair of thresholds with a constant ratio.

    A patch passes if either number reaches its threshold. So the score is the larger of the two, each relative to its
    mean over the patches.
    """
    level = lambda x: x / jnp.maximum(x.sum(-1, keepdims=True), 1e-30)
    return jnp.maximum(level(share), level(individual))
