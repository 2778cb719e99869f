"""Softmax over visible entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


def masked_softmax(
    scores: Float[Array, "*batch N"], visible: Bool[Array, "*#batch N"], present: Bool[Array, "*#batch 1"]
) -> Float[Array, "*batch N"]:
    """Probabilities over the visible entries, float32; all zero for queries that are not present."""
    scores = jnp.where(visible, scores, MASKED)
    # The maximum cancels out and has no gradient. JAX would divide its gradient by the number of scores equal to it.
    # That number is zero if compiled code computes the scores twice and rounds differently.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights * (present / weights.sum(-1, keepdims=True))


def softmax_beside(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"],
    present: Bool[Array, "*#batch 1"],
    others: Float[Array, "*batch M"] | None,
) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch M"] | None]:
    """One softmax over the visible entries and over `others`, whose finite scores are all visible: both
    probabilities. Without others it is `masked_softmax`, and None."""
    if others is None:
        return masked_softmax(scores, visible, present), None
    both = jnp.concatenate([scores, others], axis=-1)
    seen = jnp.concatenate([jnp.broadcast_to(visible, scores.shape), jnp.isfinite(others)], axis=-1)
    weights, shares = jnp.split(masked_softmax(both, seen, present), [scores.shape[-1]], axis=-1)
    return weights, shares
