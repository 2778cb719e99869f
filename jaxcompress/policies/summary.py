"""Stand-ins for evicted tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.state.precision import scores as scores_of


class Summary(NamedTuple):
    """Stand-ins for evicted tokens that every query sees beside the slots.

    Attributes:
      keys: [B, K, M, D], rotated as queries meet them.
      values: [B, K, M, D].
      bias: [B, K, 1 or G, M] float32, added to the scores: the logarithm of how many tokens each stands for, -inf for
        none.
      norm: norm * |q|^2 is subtracted from the scores of random features, which no soft cap changes; 0 for keys.
    """

    keys: Float[Array, "B K M D"]
    values: Float[Array, "B K M D"]
    bias: Float[Array, "B K #G M"]
    norm: float = 0.0

    def scores(self, q: Float[Array, "B T K G D"], traits: AttentionTraits) -> Float[Array, "B K G T M"]:
        scores = scores_of("btkgd,bkmd->bkgtm", q, self.keys)
        if self.norm:
            scores -= self.norm * jnp.square(q.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)[..., None]
        else:
            scores = traits.capped(scores)
        return scores + self.bias[:, :, :, None]
