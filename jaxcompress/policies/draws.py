"""Random numbers per token. They depend on seed, layer, head and position only, so a token's number is the same however
the sequence is cut and whatever the other rows of the batch hold."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxcompress.policies.cache_view import CacheView


def per_token(
    seed: int, tokens: CacheView, sample: Callable[[Key[Array, ""]], Array] = jax.random.uniform
) -> Float[Array, "B P N"]:
    """One draw for each token of each set."""
    key = jax.random.fold_in(jax.random.key(seed), tokens.layer)
    draw = lambda head, position: sample(jax.random.fold_in(jax.random.fold_in(key, head), position))
    sets = tokens.positions.shape[1]
    heads = jnp.array(tokens.context.which[:sets])[None, :, None] if tokens.owner is None else tokens.owner
    return jnp.vectorize(draw)(heads, jnp.maximum(tokens.positions, 0))
