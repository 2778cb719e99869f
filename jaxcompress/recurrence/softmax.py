"""Softmax over visible entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


def parts_of_softmax(
    scores: Float[Array, "*batch N"], sink: Float[Array, "*#batch 1"] | None = None
) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch 1"]]:
    """Numerators and denominator of a softmax, float32.

    Args:
      sink: a logit that joins the denominator only (see `jaxcompress.recurrence.traits.AttentionTraits`).
    """
    most = scores.max(-1, keepdims=True)
    if sink is not None:
        sink = sink.astype(jnp.float32)
        most = jnp.maximum(most, sink)
    # The maximum cancels out and has no gradient. JAX would divide its gradient by the number of scores equal to it.
    # That number is zero if compiled code computes the scores twice and rounds differently.
    most = jax.lax.stop_gradient(most)
    weights = jnp.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    return weights, total if sink is None else total + jnp.exp(sink - most)


def masked_softmax(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"],
    present: Bool[Array, "*#batch 1"],
    sink: Float[Array, "*#batch 1"] | None = None,
) -> Float[Array, "*batch N"]:
    """Probabilities over the visible entries, float32; all zero for queries that are not present.

    With a sink they sum to less than 1.
    """
    weights, total = parts_of_softmax(jnp.where(visible, scores, MASKED), sink)
    return weights * (present / total)


def softmax_beside(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"],
    present: Bool[Array, "*#batch 1"],
    others: Float[Array, "*batch M"] | None,
    sink: Float[Array, "*#batch 1"] | None = None,
) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch M"] | None]:
    """One softmax over the visible entries and over `others`, whose finite scores are all visible: both
    probabilities. Without others it is `masked_softmax`, and None."""
    if others is None:
        return masked_softmax(scores, visible, present, sink), None
    both = jnp.concatenate([scores, others], axis=-1)
    seen = jnp.concatenate([jnp.broadcast_to(visible, scores.shape), jnp.isfinite(others)], axis=-1)
    weights, shares = jnp.split(masked_softmax(both, seen, present, sink), [scores.shape[-1]], axis=-1)
    return weights, shares
