"""What a layer's attention does beyond scaled products, masks and a softmax."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_capped(scores: Float[Array, "*shape"], cap: float | Float[Array, ""] | None) -> Float[Array, "*shape"]:
    """cap * tanh(scores / cap); the scores themselves without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


class AttentionTraits(NamedTuple):
    """The constants of one layer's attention. All paths that compute scores take them.

    Attributes:
      softcap: a score s becomes softcap * tanh(s / softcap), before biases and masks (Gemma 2); None for no cap.
    """

    softcap: float | Float[Array, ""] | None = None

    def capped(self, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scaled products of queries and keys, soft-capped."""
        return soft_capped(scores, self.softcap)

    @property
    def beyond_kernels(self) -> str | None:
        """The reason why no kernel can compute this attention; None if one may."""
        return None if self.softcap is None else "the layer caps its attention scores"


PLAIN = AttentionTraits()
"""Attention of scaled products, masks and a softmax alone."""
