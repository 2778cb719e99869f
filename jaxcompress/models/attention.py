"""The projections of attention, and what a layer's attention has of its own."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.initializers import initializers
from jaxcompress.models.int8 import Linear
from jaxcompress.models.norms import NORMS
from jaxcompress.models.rope import Rotary
from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.state.shapes import Hidden, Keys, Positions, Queries, Values


class LayerConstants(NamedTuple):
    """What stays the same while tokens pass through the attention of one layer.

    Attributes:
      rotary: the layer's position embedding.
      window: its sliding window in tokens; None if no layer of the model has one.
      traits: what its attention does beyond scaled products and a softmax.
    """

    rotary: Rotary
    window: Int[Array, ""] | None
    traits: AttentionTraits

    def placed(self, q: Queries, k: Keys, positions: Positions) -> tuple[Queries, Keys]:
        """Queries and keys, rotated to their positions."""
        at = positions[..., None]
        return self.rotary(q, at), self.rotary(k, at)


class Attention(nnx.Module):
    """Query, key, value and output projections of attention, and its sinks."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e, d = config.hidden_size, config.head_dim
        small, out = initializers(config)
        linear = lambda n, m, bias, init: Linear(n, m, use_bias=bias, kernel_init=init, param_dtype=dtype, rngs=rngs)
        self.query = linear(e, config.num_heads * d, config.qkv_bias, small)
        self.key = linear(e, config.num_kv_heads * d, config.qkv_bias, small)
        self.value = linear(e, config.num_kv_heads * d, config.qkv_bias, small)
        self.out = linear(config.num_heads * d, e, config.out_bias, out)
        if config.qk_norm:
            norm = lambda heads: NORMS[config.norm](
                d if config.qk_norm_over == "head" else heads * d,
                epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs,
            )  # fmt: skip
            self.query_norm, self.key_norm = norm(config.num_heads), norm(config.num_kv_heads)
        if config.sinks:
            self.sinks = nnx.Param(small(rngs.params(), (config.num_heads,), dtype))

    def project(self, x: Hidden, config: DecoderConfig) -> tuple[Queries, Keys, Values]:
        """Queries, keys and values before RoPE. Scores of the queries are divided by the square root of D."""
        heads = lambda y: y.reshape(*y.shape[:-1], -1, config.head_dim)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if config.qk_norm and config.qk_norm_over == "projection":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = heads(q), heads(k), heads(v)
        if config.qk_norm and config.qk_norm_over == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        return _rescaled(q, config), k, v

    def constants(self, config: DecoderConfig, index: Int[Array, ""] | int) -> LayerConstants:
        """Those of this layer, whose number is `index`."""
        window = None if config.windows is None else config.windows[index]
        traits = AttentionTraits(config.softcap, self.sinks[...] if config.sinks else None)
        return LayerConstants(config.rotary(index), window, traits)

    def project_out(self, out: Float[Array, "B T *heads"]) -> Hidden:
        """From the outputs of all heads, [B, T, H, D] or [B, T, K, G, D]."""
        return self.out(out.reshape(*out.shape[:2], -1))


def _rescaled(q: Float[Array, "... D"], config: DecoderConfig) -> Float[Array, "... D"]:
    """Queries whose scores over the square root of D are those over the square root of `query_pre_attn_scalar`."""
    scalar = config.query_pre_attn_scalar
    if scalar is None or scalar == config.head_dim:
        return q
    return (q.astype(jnp.float32) * (config.head_dim / scalar) ** 0.5).astype(q.dtype)
