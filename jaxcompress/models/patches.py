"""The tokens of pictures inside a vision tower, and the type of functions that drop or merge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.recurrence.inputs import AttentionInputs

Pixels = Float[Array, "B channels side side"]
"""Normalised by the checkpoint's image processor; channels first, as in transformers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patches:
    """Tokens of pictures inside a tower. Special tokens come first and stay where they are.

    Attributes:
      hidden: [B, N, E], the residual stream.
      size: [B, N] float32, number of the tower's tokens that each token stands for. 0 marks an empty place, which no
        token attends to (fixed shapes for methods that keep a different number in each picture).
      group: [B, M] int32, for each of the M tokens of `embed` the index of the token it went into; -1 if dropped.
    """

    hidden: Float[Array, "B N E"]
    size: Float[Array, "B N"]
    group: Int[Array, "B M"]

    def become(self, hidden: Float[Array, "B n E"], size: Float[Array, "B n"], into: Int[Array, "B N"]) -> Patches:
        """Replaces the tokens with new ones.

        Args:
          into: index of the new token that each current token went into, -1 if it was dropped.
        """
        followed = jnp.take_along_axis(into, jnp.maximum(self.group, 0), axis=1)
        return Patches(hidden, size, jnp.where(self.group >= 0, followed, -1).astype(jnp.int32))

    def take(self, index: Int[Array, "B n"]) -> Patches:
        """Only the tokens at these indices, in this order; the others are dropped.

        Args:
          index: distinct in each row.
        """
        rows = jnp.arange(index.shape[0])[:, None]
        into = jnp.full(self.size.shape, -1, jnp.int32)
        into = into.at[rows, index].set(jnp.arange(index.shape[1], dtype=jnp.int32))
        hidden = jnp.take_along_axis(self.hidden, index[..., None], axis=1)
        return self.become(hidden, jnp.take_along_axis(self.size, index, axis=1), into)


Reduce = Callable[[Patches, AttentionInputs, int], Patches]
"""(tokens, attention inputs of this layer, number of the layer) -> fewer tokens."""
