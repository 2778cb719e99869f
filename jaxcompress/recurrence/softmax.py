"""Softmax over visible entries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


def unmasked(bias: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Which keys are there: those to whose scores anything but `MASKED` is added."""
    return bias > MASKED / 2  # a bias that was added to


class Exponentials(NamedTuple):
    """A softmax before its division: a probability is an exponential divided by the total.

    Attributes:
      visible: [..., N] float32, of the entries; zero where they are not visible.
      others: [..., M] float32, of the entries beside them, or None.
      total: [..., 1] float32, the sum of both, and of the sink's.
    """

    visible: Float[Array, "*batch N"]
    others: Float[Array, "*batch M"] | None
    total: Float[Array, "*batch 1"]


def exponentials(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"] | None = None,
    others: Float[Array, "*batch M"] | None = None,
    sink: Float[Array, "*#batch 1"] | None = None,
) -> Exponentials:
    """The exponentials of one softmax over the visible entries, over `others` and over a sink.

    Args:
      visible: None if all entries are, or are masked already.
      others: scores of entries beside them. Finite ones are visible.
      sink: a logit that joins the total only (see `jaxcompress.state.attention_traits.AttentionTraits`).
    """
    scores = scores if visible is None else jnp.where(visible, scores, MASKED)
    most = scores.max(-1, keepdims=True)
    if others is not None:
        others = jnp.where(jnp.isfinite(others), others, MASKED)
        most = jnp.maximum(most, others.max(-1, keepdims=True))
    if sink is not None:
        sink = sink.astype(jnp.float32)
        most = jnp.maximum(most, sink)
    # The maximum cancels out and has no gradient. JAX would divide its gradient by the number of scores equal to it.
    # That number is zero if compiled code computes the scores twice and rounds differently.
    most = jax.lax.stop_gradient(most)
    weights, shares = jnp.exp(scores - most), None
    total = weights.sum(-1, keepdims=True)
    if others is not None:
        shares = jnp.exp(others - most)
        total += shares.sum(-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - most)
    return Exponentials(weights, shares, total)


def masked_softmax(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"],
    present: Bool[Array, "*#batch 1"],
    sink: Float[Array, "*#batch 1"] | None = None,
) -> Float[Array, "*batch N"]:
    """Probabilities over the visible entries, float32; all zero for queries that are not present.

    With a sink they sum to less than 1.
    """
    return softmax_beside(scores, visible, present, None, sink)[0]


def softmax_beside(
    scores: Float[Array, "*batch N"],
    visible: Bool[Array, "*#batch N"],
    present: Bool[Array, "*#batch 1"],
    others: Float[Array, "*batch M"] | None,
    sink: Float[Array, "*#batch 1"] | None = None,
) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch M"] | None]:
    """One softmax over the visible entries and over `others`, whose finite scores are all visible: both
    probabilities; None in place of the second without others. All are zero for queries that are not present."""
    parts = exponentials(scores, visible, others, sink)
    share = present / parts.total
    return parts.visible * share, None if parts.others is None else parts.others * share
