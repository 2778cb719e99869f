"""A decoder that is small enough to compile in a second, with weights that make its attention sharp."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.cache_view import CacheView, LayerContext

VOCABULARY = 61


@cache
def tiny_decoder(vocabulary: int = VOCABULARY, **changes: Any) -> Decoder:
    """Shared between tests: not to be changed."""
    config = DecoderConfig(vocabulary, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, **changes)
    larger = {"embedding": 50.0, "head": 10.0}

    def scaled(path: Any, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            return weight * 12
        return weight * next((by for part, by in larger.items() if part in name), 1.0)

    return jax.tree_util.tree_map_with_path(scaled, Decoder(config, rngs=nnx.Rngs(0)))


def random_tokens(*shape: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape, np.int32)


def with_embedding(model: Decoder, token: int, value: float) -> Decoder:
    """The model with one token's embedding replaced."""
    changed = lambda path, x: x.at[token].set(value) if "embedding" in jax.tree_util.keystr(path) else x
    return jax.tree_util.tree_map_with_path(changed, model)


def candidates(
    keys: Any, values: Any, positions: Any, *, heads: int | None = None, capacity: int = 1, **fields: Any
) -> CacheView:
    """What a policy chooses from, for a layer whose positions are not rotated.

    Args:
      keys, values: [B, K, N, D].
      positions: [B, P, N].
      heads: H; K by default.
    """
    keys, values, positions = (jnp.asarray(x) for x in (keys, values, positions))
    kv = keys.shape[1]
    context = LayerContext(lambda x, at: x, "absolute", None, (heads or kv, kv), tuple(range(kv)))
    seen = jnp.zeros(keys.shape[0], jnp.int32)
    given: dict[str, Any] = dict(owner=None, seen=seen, layer=jnp.int32(0), memory=(), context=context)
    return CacheView(keys, values, positions, capacity=capacity, **(given | fields))
