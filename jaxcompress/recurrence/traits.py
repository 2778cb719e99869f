"""What a layer's attention has beyond queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float


class AttentionTraits(NamedTuple):
    """Constants of one layer's attention, the same for every token.

    Attributes:
      sinks: [H], one learned logit per query head, or None. It joins the denominator of the head's softmax and has no
        value, so that a head may attend to nothing (GPT-OSS; Xiao et al. 2024). The probabilities of tokens, which
        policies observe, then sum to less than 1.
    """

    sinks: Float[Array, " H"] | None = None

    def grouped_sinks(self, kv_heads: int) -> Float[Array, "K G"] | None:
        """The sinks as [K, G], for K kv heads."""
        return None if self.sinks is None else self.sinks.reshape(kv_heads, -1)

    @property
    def beyond_kernels(self) -> str | None:
        """The reason why no kernel computes this attention; None if kernels may."""
        return None if self.sinks is None else "the layer has attention sinks"


PLAIN = AttentionTraits()
"""Attention without anything of the kind."""
