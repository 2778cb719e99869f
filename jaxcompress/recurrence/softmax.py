"""Softmax over visible entries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


class Exponentials(NamedTuple):
    """A softmax before its division: a probability is an exponential divided by the total.

    Attributes:
      visible: [..., N] float32, of the entries; zero where they are not visible.
      others: [..., M] float32, of the entries beside them, or None.
      total: [..., 1] float32, the sum of both.
    """

    visible: Float[Array, "*batch N"]
    others: Float[Array, "*batch M"] | None
    total: Float[Array, "*batch 1"]


def exponentials(
    scores: Float[Array, "*batch N"], visible: Bool[Array, "*#batch N"], others: Float[Array, "*batch M"] | None = None
) -> Exponentials:
    """The exponentials of one softmax over the visible entries and over `others`, whose finite scores are visible."""
    scores = jnp.where(visible, scores, MASKED)
    # The maximum cancels out and has no gradient. JAX would divide its gradient by the number of scores equal to it.
    # That number is zero if compiled code computes the scores twice and rounds differently.
    most = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    if others is None:
        weights = jnp.exp(scores - most)
        return Exponentials(weights, None, weights.sum(-1, keepdims=True))
    others = jnp.where(jnp.isfinite(others), others, MASKED)
    most = jnp.maximum(most, jax.lax.stop_gradient(others.max(-1, keepdims=True)))
    weights, shares = jnp.exp(scores - most), jnp.exp(others - most)
    return Exponentials(weights, shares, weights.sum(-1, keepdims=True) + shares.sum(-1, keepdims=True))


def masked_softmax(
    scores: Float[Array, "*batch N"], visible: Bool[Array, "*#batch N"], present: Bool[Array, "*#batch 1"]
) -> Float[Array, "*batch N"]:
    """Probabilities over the visible entries, float32; all zero for queries that are not present."""
    return softmax_beside(scores, visible, present, None)[0]


def softmax_beside(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"],
    present: Bool[Array, "*#batch 1"],
    others: Float[Array, "*batch M"] | None,
) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch M"] | None]:
    """One softmax over the visible entries and over `others`, whose finite scores are all visible: both
    probabilities; None in place of the second without others. All are zero for queries that are not present."""
    parts = exponentials(scores, visible, others)
    share = present / parts.total
    return parts.visible * share, None if parts.others is None else parts.others * share
