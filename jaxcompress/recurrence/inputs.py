"""What one layer of attention compared."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.recurrence.softmax import MASKED, masked_softmax
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.shapes import Keys, Positions, Queries


class AttentionInputs(NamedTuple):
    """What one layer's attention compared: enough for any row of its probabilities, none of which is computed unasked.

    Attributes:
      queries: [B, T, H, D], as they met the keys: in a decoder rotated to their positions.
      keys: [B, T, K, D], likewise.
      bias: [B, T] float32, what was added to the scores of each key; `MASKED` for what nobody sees.
      positions: [B, T], where tokens stand if attention is causal, -1 for padding; None if it is not (encoders).
    """

    queries: Queries
    keys: Keys
    bias: Float[Array, "B T"]
    positions: Positions | None = None

    def rows(self, index: Int[Array, "B R"]) -> Float[Array, "B H R T"]:
        """The attention probabilities of some queries, float32; zero for those of padding.

        Args:
          index: which queries of each row of the batch.
        """
        b, t, h, d = self.queries.shape
        kv = self.keys.shape[2]
        q = jnp.take_along_axis(self.queries, index[..., None, None], axis=1).reshape(b, -1, kv, h // kv, d)
        scores = scores_of("brkgd,btkd->bkgrt", q, self.keys)
        scores += self.bias[:, None, None, None]
        visible = (self.bias > MASKED / 2)[:, None, None, None]
        present = jnp.ones((b, 1, 1, index.shape[1], 1), bool)
        if self.positions is not None:
            at = jnp.take_along_axis(self.positions, index, axis=1)[:, None, None, :, None]
            key = self.positions[:, None, None, None]
            visible, present = visible & (key >= 0) & (key <= at), at >= 0
        return masked_softmax(scores, visible, present).reshape(b, h, -1, t)
