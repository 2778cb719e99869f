"""One decoder for the Llama, Mistral and Qwen families (GQA, RoPE, gated MLP), as a Flax NNX module used as a pytree.

The module holds weights, stacked over layers, and says nothing about where keys and values live: its layers are
scanned with an `Attend` function that does. Plain causal attention is one such function (training, teacher
forcing); a step of the bounded recurrence is another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxcompress.attention import causal_attention
from jaxcompress.models.lookup import look_up
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.shapes import AttentionOut, Hidden, Keys, Logits, Positions, Queries, Tokens, Values
from jaxcompress.token_ids import check_read


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Hashable, so that it can be a static argument under jit.

    Attributes:
      qkv_bias: biases on the query, key and value projections (Qwen2).
      out_bias, mlp_bias: biases on the output projection and in the MLP (Llama with `attention_bias`, `mlp_bias`).
      qk_norm: RMS norm of each head's query and key before RoPE (Qwen3).
      tied: the output projection is the embedding, transposed.
      sliding: one entry per layer; the window of a sliding-window layer (a query sees itself and window - 1
        earlier tokens), None for a full layer. Empty: every layer is full.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    sliding: tuple[int | None, ...] = ()
    max_position: int = 2048

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}: RoPE rotates channels in pairs")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.sliding and len(self.sliding) != self.num_layers:
            raise ValueError(f"sliding has {len(self.sliding)} entries for {self.num_layers} layers")

    @property
    def windows(self) -> Int[Array, " L"] | None:
        """Sliding window per layer as an array (a full layer's is larger than any position), None if all are full."""
        if not any(self.sliding):
            return None
        return jnp.array([w or jnp.iinfo(jnp.int32).max for w in self.sliding], jnp.int32)


@runtime_checkable
class Attend(Protocol):
    """What a layer does with its queries, keys and values; none of them is rotated yet.

    `layer` has this layer's weights and `index` is its number as a scalar array; `carry` is whatever travels from layer
    to layer (a KV state), `xs` this layer's slice of what the caller gave per layer. Returns the attention output, the
    carry, and a per-layer result.
    """

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        positions: Positions,
        layer: Layer,
        index: Int[Array, ""],
        carry: Any,
        xs: Any,
    ) -> tuple[AttentionOut, Any, Any]: ...


class Attention(nnx.Module):
    """Projections around attention."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        e, d = config.hidden_size, config.head_dim
        small, out = _initializers(config)
        linear = lambda n, m, bias, init: nnx.Linear(
            n, m, use_bias=bias, kernel_init=init, param_dtype=dtype, rngs=rngs
        )
        self.query = linear(e, config.num_heads * d, config.qkv_bias, small)
        self.key = linear(e, config.num_kv_heads * d, config.qkv_bias, small)
        self.value = linear(e, config.num_kv_heads * d, config.qkv_bias, small)
        self.out = linear(config.num_heads * d, e, config.out_bias, out)
        if config.qk_norm:
            self.query_norm = nnx.RMSNorm(d, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)
            self.key_norm = nnx.RMSNorm(d, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)

    def project(self, x: Hidden, config: DecoderConfig) -> tuple[Queries, Keys, Values]:
        heads = lambda y: y.reshape(*y.shape[:-1], -1, config.head_dim)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v


class MLP(nnx.Module):
    """SiLU-gated feed-forward network (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        e, f = config.hidden_size, config.intermediate_size
        small, out = _initializers(config)
        linear = lambda n, m, init: nnx.Linear(
            n, m, use_bias=config.mlp_bias, kernel_init=init, param_dtype=dtype, rngs=rngs
        )
        self.gate, self.up, self.down = linear(e, f, small), linear(e, f, small), linear(f, e, out)

    def __call__(self, x: Hidden) -> Hidden:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        norm = lambda: nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Attributes:
      config: its shape (static).
      embedding: [V, E].
      layers: one `Layer` whose arrays have a leading axis L.
      head: [E, V], absent if tied.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        small, _ = _initializers(config)
        self.embedding = nnx.Param(small(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Layer(config, dtype=dtype, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)
        if not config.tied:
            self.head = nnx.Param(small(rngs.params(), (config.hidden_size, config.vocab_size), dtype))

    def embed(self, tokens: Tokens) -> Hidden:
        """[B, T, E]; ids are not looked at: one outside the vocabulary gives some other token's embedding, or NaN."""
        return look_up(self.embedding[...], tokens)

    def run_layers(
        self,
        x: Hidden,
        positions: Positions,
        attend: Attend,
        carry: Any = (),
        xs: Any = None,
        layers: range | None = None,
    ) -> tuple[Hidden, Any, Any]:
        """Runs some layers, all by default; returns the residual stream, the carry, and per-layer results stacked."""
        config = self.config

        def body(loop: tuple[Hidden, Any], inputs: Any) -> tuple[tuple[Hidden, Any], Any]:
            x, carry = loop
            layer, index, x_slice = inputs
            if layer is None:
                layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), self.layers)
            q, k, v = layer.attention.project(layer.attention_norm(x), config)
            out, carry, y = attend(q, k, v, positions, layer, index, carry, x_slice)
            x = x + layer.attention.out(out.reshape(*x.shape[:-1], -1))
            return (x + layer.mlp(layer.mlp_norm(x)), carry), y

        every = range(config.num_layers)
        layers = every if layers is None else layers
        # A part of the layers is indexed inside the loop: slicing the stacked weights would copy them at each call.
        weights = self.layers if layers == every else None
        indices = jnp.arange(layers.start, layers.stop, dtype=jnp.int32)
        (x, carry), ys = jax.lax.scan(body, (x, carry), (weights, indices, xs))
        return x, carry, ys

    def logits(self, x: Hidden) -> Logits:
        """Scores of the next token, float32."""
        head = self.embedding[...].T if self.config.tied else self.head[...]
        return jnp.matmul(x, head, preferred_element_type=jnp.float32)

    def __call__(self, tokens: Tokens, positions: Positions | None = None) -> Logits:
        """Plain causal attention over the block, no state. Positions default to 0..T-1; -1 marks padding."""
        return self.logits(self.norm(self.hidden(tokens, positions)))

    def hidden(self, tokens: Tokens, positions: Positions | None = None) -> Hidden:
        """The same up to the last layer, not normed.

        Raises:
          ValueError: tokens that are no integers [B, T], or ids outside the vocabulary (not checked under jit).
        """
        check_read(tokens, self.config.vocab_size, None if positions is None else positions >= 0)
        return self.hidden_of(self.embed(tokens), positions)

    def hidden_of(self, x: Hidden, positions: Positions | None = None) -> Hidden:
        """The same from embeddings, which need not be those of tokens."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        windows = self.config.windows

        def attend(q, k, v, positions, layer, index, carry, xs):
            at = positions[..., None]
            q, k = rotate(q, at, self.config.rope), rotate(k, at, self.config.rope)
            window = None if windows is None else windows[index]
            return causal_attention(q, k, v, positions, window=window), carry, xs

        return self.run_layers(x, positions, attend)[0]


def _initializers(config: DecoderConfig) -> tuple[Any, Any]:
    """Normal(0.02), and the same scaled by the depth for what is added to the residual stream (GPT-2)."""
    return jax.nn.initializers.normal(0.02), jax.nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
