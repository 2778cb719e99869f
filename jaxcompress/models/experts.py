"""Mixture of experts: a router sends each token to a few of many gated MLPs (Shazeer et al. 2017; Mixtral 2024).

Tokens are grouped by expert, and each group is cut into blocks of equal size. A loop then multiplies one block at a
time by the weights of its expert, which it reads in place. Few tokens make blocks of one row, so a decoding step reads
the weights of the chosen experts only. No token is dropped, and a token's result does not depend on other tokens.

`jax.lax.ragged_dot` is the alternative. Except on TPUs, XLA of jaxlib 0.10 computes it as one dense product in which
each row meets all experts: X times the work and the memory of X experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.models.activations import ACTIVATIONS
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.experts_config import ClampedGate, ExpertsConfig
from jaxcompress.models.initializers import initializers
from jaxcompress.models.int8 import Int8Matrix, Linear, part_of, product
from jaxcompress.state.shapes import Hidden

MOST_ROWS = 128
"""The largest block. Larger ones would compute more padding: on average half a block for each expert."""


class ExpertWeights(NamedTuple):
    """The weights of one layer's experts. Biases are None if there are none."""

    gate: Float[Array, "X E F"] | Int8Matrix
    up: Float[Array, "X E F"] | Int8Matrix
    down: Float[Array, "X F E"] | Int8Matrix
    gate_bias: Float[Array, "X F"] | None = None
    up_bias: Float[Array, "X F"] | None = None
    down_bias: Float[Array, "X E"] | None = None


class Experts(nnx.Module):
    """The experts of a layer and their router, in place of an MLP.

    Attributes:
      router: linear layer with one logit per expert.
      gate, up: [X, E, F].
      down: [X, F, E].
      gate_bias, up_bias, down_bias: [X, F] and [X, E], absent without biases.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, e, f = experts_of(config), config.hidden_size, config.intermediate_size
        small, out = initializers(config)
        x = experts.count
        self.router = Linear(e, x, use_bias=experts.bias, kernel_init=small, param_dtype=dtype, rngs=rngs)
        self.gate = nnx.Param(small(rngs.params(), (x, e, f), dtype))
        self.up = nnx.Param(small(rngs.params(), (x, e, f), dtype))
        self.down = nnx.Param(out(rngs.params(), (x, f, e), dtype))
        if experts.bias:
            self.gate_bias = nnx.Param(jnp.zeros((x, f), dtype))
            self.up_bias = nnx.Param(jnp.zeros((x, f), dtype))
            self.down_bias = nnx.Param(jnp.zeros((x, e), dtype))

    def __call__(self, x: Hidden, config: DecoderConfig) -> Hidden:
        experts, tokens = experts_of(config), x.reshape(-1, x.shape[-1])
        biases = (self.gate_bias[...], self.up_bias[...], self.down_bias[...]) if experts.bias else ()
        weights = ExpertWeights(self.gate[...], self.up[...], self.down[...], *biases)
        shares, chosen = route(self.router(tokens), experts)
        return run_experts(tokens, shares, chosen, weights, gate_of(config)).reshape(x.shape)


def experts_of(config: DecoderConfig) -> ExpertsConfig:
    """The experts of a decoder with `mlp="experts"`."""
    assert config.experts is not None
    return config.experts


Gate = Callable[[Array, Array], Array]
"""(gate, up), float32 -> what the down projection gets."""


def gate_of(config: DecoderConfig) -> Gate:
    """How the experts of a decoder join gate and up."""
    clamped = experts_of(config).clamped
    if clamped is not None:
        return partial(clamped_gate, clamped)
    activation = ACTIVATIONS[config.activation]
    return lambda gate, up: activation(gate) * up


def clamped_gate(to: ClampedGate, gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    gate, up = jnp.minimum(gate, to.limit), jnp.clip(up, -to.limit, to.limit)
    return gate * jax.nn.sigmoid(to.alpha * gate) * (up + 1)


def route(logits: Float[Array, "N X"], config: ExpertsConfig) -> tuple[Float[Array, "N c"], Int[Array, "N c"]]:
    """The experts chosen for each token, and their weights, float32."""
    logits = logits.astype(jnp.float32)
    best, experts = jax.lax.top_k(logits, config.chosen)
    if config.normalised:
        return jax.nn.softmax(best, axis=-1), experts
    return jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), experts


def run_experts(
    x: Float[Array, "N E"],
    shares: Float[Array, "N c"],
    experts: Int[Array, "N c"],
    weights: ExpertWeights,
    gated: Gate,
) -> Float[Array, "N E"]:
    """The sum of the chosen experts' outputs for each token, weighted by `shares`."""
    blocks = group(experts, jax.tree.leaves(weights.gate)[0].shape[0])
    rows = blocks.rows(x)
    times = lambda x, w: blocked_product(x, w, blocks.expert)
    biased = lambda y, bias: y if bias is None else y + bias[blocks.expert][:, None]
    gate, up = (
        biased(times(rows, w), bias) for w, bias in ((weights.gate, weights.gate_bias), (weights.up, weights.up_bias))
    )
    out = biased(times(gated(gate, up).astype(x.dtype), weights.down), weights.down_bias)
    each = out.reshape(-1, x.shape[-1])[blocks.place]  # [N, c, E]
    return (each * shares[..., None]).sum(1).astype(x.dtype)


class Blocks(NamedTuple):
    """Tokens grouped by expert, in n blocks of m rows. All rows of a block go to one expert.

    Attributes:
      expert: the expert of each block.
      token: the token in each row; N, one past the last, for a row without a token.
      place: the row of each token for each of its experts, counted through all blocks.
    """

    expert: Int[Array, " n"]
    token: Int[Array, "n m"]
    place: Int[Array, "N c"]

    def rows(self, x: Float[Array, "N E"]) -> Float[Array, "n m E"]:
        """The tokens in their rows; zeros where there is none."""
        return x.at[self.token].get(mode="fill", fill_value=0)


def group(experts: Int[Array, "N c"], count: int) -> Blocks:
    """Groups the chosen experts of N tokens by expert. `count` is the number of all experts."""
    size = experts.size
    height = block_height(size, count)
    groups = min(count, size)
    n = (size + groups * (height - 1)) // height  # each group ends within a block
    flat = experts.reshape(-1)
    tokens = jnp.bincount(flat, length=count)
    full = -(-tokens // height)  # blocks of each expert
    last = jnp.cumsum(full)
    order = jnp.argsort(flat, stable=True)
    whose = flat[order]
    nth = jnp.arange(size) - (jnp.cumsum(tokens) - tokens)[whose]
    row = (last - full)[whose] * height + nth
    expert = jnp.searchsorted(last, jnp.arange(n), side="right").clip(max=count - 1)
    token = jnp.full(n * height, experts.shape[0], jnp.int32).at[row].set(order // experts.shape[1])
    place = jnp.zeros(size, jnp.int32).at[order].set(row)
    return Blocks(expert.astype(jnp.int32), token.reshape(n, height), place.reshape(experts.shape))


def block_height(size: int, count: int) -> int:
    """The rows of a block: about as many as an expert has tokens on average, at most `MOST_ROWS`."""
    mean = max(size // count, 1)
    return min(1 << (mean.bit_length() - 1), MOST_ROWS)


@jax.custom_vjp
def blocked_product(
    x: Float[Array, "n m E"], weights: Float[Array, "X E F"] | Int8Matrix, expert: Int[Array, " n"]
) -> Float[Array, "n m F"]:
    """Each block times the weights of its expert, float32.

    The gradient of the weights is added up in place: the one that JAX derives for a loop would write an array of the
    size of all weights for each block.
    """
    times = lambda block: _times(block[0], part_of(weights, block[1]))
    return jax.lax.map(times, (x, expert))


def _times(a: Array, b: Array | Int8Matrix) -> Array:
    return product(a, b, jnp.float32)


def _forward(x: Array, weights: Array, expert: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return blocked_product(x, weights, expert), (x, weights, expert)


def _backward(saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    x, weights, expert = saved

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, slope, one = block
        return total.at[one].add(_times(x.T, slope)), _times(slope, weights[one].T)

    start = jnp.zeros(weights.shape, jnp.float32)
    to_weights, to_x = jax.lax.scan(add, start, (x, cotangent, expert))
    return to_x.astype(x.dtype), to_weights.astype(weights.dtype), None


blocked_product.defvjp(_forward, _backward)
