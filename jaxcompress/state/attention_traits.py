"""What a layer's attention does beyond scaled products, masks and a softmax."""

from __future__ import annotations

from collections.abc import Sequence
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
      sinks: [H], one learned logit for each query head, or None. It joins the denominator of the head's softmax and has
        no value, so that a head may attend to nothing (GPT-OSS; Xiao et al. 2024). No soft cap changes it. The
        probabilities of tokens, which policies observe, then sum to less than 1.
    """

    softcap: float | Float[Array, ""] | None = None
    sinks: Float[Array, " H"] | None = None

    def capped(self, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scaled products of queries and keys, soft-capped."""
        return soft_capped(scores, self.softcap)

    def sinks_beside(self, scores: Float[Array, "B K G *queries N"]) -> Float[Array, "K G *ones 1"] | None:
        """The sinks in the form of these scores: those of one more entry; None without sinks."""
        if self.sinks is None:
            return None
        return self.sinks.reshape(*scores.shape[1:3], *(1,) * (scores.ndim - 3))

    def of_heads(self, which: Sequence[int], kv_heads: int) -> AttentionTraits:
        """The traits of some kv heads of a layer that has `kv_heads` of them."""
        if self.sinks is None:
            return self
        return self._replace(sinks=self.sinks.reshape(kv_heads, -1)[jnp.array(which)].reshape(-1))

    @property
    def beyond_kernels(self) -> str | None:
        """The reason why no kernel can compute this attention; None if one may."""
        if self.softcap is not None:
            return "the layer caps its attention scores"
        return None if self.sinks is None else "the layer has attention sinks"


PLAIN = AttentionTraits()
"""Attention of scaled products, masks and a softmax alone."""
