"""The inputs of one attention layer."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.recurrence.softmax import masked_softmax, unmasked
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.shapes import Keys, Positions, Queries


class AttentionInputs(NamedTuple):
    """The inputs of one layer's attention. Any row of its probabilities can be computed from them on demand.

    Attributes:
      queries: [B, T, H, D], as compared with the keys: in a decoder, rotated to their positions.
      keys: [B, T, K, D], likewise.
      bias: [B, T] float32, the term added to the scores of each key; `MASKED` for a key that no query sees.
      positions: [B, T], positions of the tokens if attention is causal, -1 for padding; None if it is not (encoders).
      traits: what the layer's attention does beyond scaled products and a softmax.
    """

    queries: Queries
    keys: Keys
    bias: Float[Array, "B T"]
    positions: Positions | None = None
    traits: AttentionTraits = PLAIN

    def rows(self, index: Int[Array, "B R"]) -> Float[Array, "B H R T"]:
        """The attention probabilities of some queries, float32; zero for padded queries.

        Args:
          index: the queries to take in each row of the batch.
        """
        b, t, h, d = self.queries.shape
        kv = self.keys.shape[2]
        q = jnp.take_along_axis(self.queries, index[..., None, None], axis=1).reshape(b, -1, kv, h // kv, d)
        scores = self.traits.capped(scores_of("brkgd,btkd->bkgrt", q, self.keys))
        scores += self.bias[:, None, None, None]
        visible = unmasked(self.bias)[:, None, None, None]
        present = jnp.ones((b, 1, 1, index.shape[1], 1), bool)
        if self.positions is not None:
            at = jnp.take_along_axis(self.positions, index, axis=1)[:, None, None, :, None]
            key = self.positions[:, None, None, None]
            visible, present = visible & (key >= 0) & (key <= at), at >= 0
        return masked_softmax(scores, visible, present, self.traits.sinks_beside(scores)).reshape(b, h, -1, t)
