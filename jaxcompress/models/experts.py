"""Mixture of experts: a router sends each token to a few of many gated MLPs (Shazeer et al. 2017; Mixtral 2024).

Tokens are grouped by expert, and each group is cut into blocks of equal size. A loop then multiplies one block at a
time by the weights of its expert, which it reads in place. Few tokens make blocks of one row, so a decoding step reads
the weights of the chosen experts only. No token is dropped, and a token's result does not depend on other tokens.

`jax.lax.ragged_dot` is the alternative. Except on TPUs, XLA of jaxlib 0.10 computes it as one dense product in which
each row meets all experts: X times the work and the memory of X experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.state.shapes import Hidden

MOST_ROWS = 128
"""The largest block. Larger ones would compute more padding: on average half a block for each expert."""


@dataclass(frozen=True)
class ClampedGate:
    """The gate of GPT-OSS: min(g, limit) * sigmoid(alpha * g) * (clip(u, -limit, limit) + 1)."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of each layer. Their width is the decoder's `intermediate_size`.

    Attributes:
      count: X, the number of experts.
      chosen: the number of experts that a token is sent to.
      normalised: the weights of the chosen experts sum to 1 (Mixtral, GPT-OSS: a softmax over the chosen logits); else
        they are shares of a softmax over all experts (Qwen3-MoE without `norm_topk_prob`).
      bias: biases on the router and in the experts.
      clamped: the gate of GPT-OSS; None for the SiLU gate.
    """

    count: int
    chosen: int
    normalised: bool = True
    bias: bool = False
    clamped: ClampedGate | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"a token goes to 1 to {self.count} experts, not {self.chosen}: there are {self.count}")


class ExpertWeights(NamedTuple):
    """The weights of one layer's experts. Biases are None if there are none."""

    gate: Float[Array, "X E F"]
    up: Float[Array, "X E F"]
    down: Float[Array, "X F E"]
    gate_bias: Float[Array, "X F"] | None = None
    up_bias: Float[Array, "X F"] | None = None
    down_bias: Float[Array, "X E"] | None = None


class Experts(nnx.Module):
    """The experts of a layer and their router, in place of an MLP.

    Attributes:
      config: their number, and how tokens are sent to them (static).
      router: linear layer with one logit per expert.
      gate, up: [X, E, F].
      down: [X, F, E].
      gate_bias, up_bias, down_bias: [X, F] and [X, E], absent without biases.
    """

    def __init__(
        self, config: ExpertsConfig, hidden: int, width: int, *, init: tuple, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        """
        Args:
          hidden: E.
          width: F.
          init: the initialisers of weights that read the residual stream, and of those that add to it.
        """
        self.config = config
        small, out = init
        x = config.count
        self.router = nnx.Linear(hidden, x, use_bias=config.bias, kernel_init=small, param_dtype=dtype, rngs=rngs)
        self.gate = nnx.Param(small(rngs.params(), (x, hidden, width), dtype))
        self.up = nnx.Param(small(rngs.params(), (x, hidden, width), dtype))
        self.down = nnx.Param(out(rngs.params(), (x, width, hidden), dtype))
        if config.bias:
            self.gate_bias = nnx.Param(jnp.zeros((x, width), dtype))
            self.up_bias = nnx.Param(jnp.zeros((x, width), dtype))
            self.down_bias = nnx.Param(jnp.zeros((x, hidden), dtype))

    def __call__(self, x: Hidden) -> Hidden:
        tokens = x.reshape(-1, x.shape[-1])
        biases = (self.gate_bias[...], self.up_bias[...], self.down_bias[...]) if self.config.bias else ()
        weights = ExpertWeights(self.gate[...], self.up[...], self.down[...], *biases)
        shares, experts = route(self.router(tokens), self.config)
        return run_experts(tokens, shares, experts, weights, self.config.clamped).reshape(x.shape)


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
    clamped: ClampedGate | None = None,
) -> Float[Array, "N E"]:
    """The sum of the chosen experts' outputs for each token, weighted by `shares`."""
    blocks = group(experts, weights.gate.shape[0])
    rows = blocks.rows(x)
    times = lambda x, w: blocked_product(x, w, blocks.expert)
    biased = lambda y, bias: y if bias is None else y + bias[blocks.expert][:, None]
    gate, up = (
        biased(times(rows, w), bias) for w, bias in ((weights.gate, weights.gate_bias), (weights.up, weights.up_bias))
    )
    out = biased(times(gated(gate, up, clamped).astype(x.dtype), weights.down), weights.down_bias)
    each = out.reshape(-1, x.shape[-1])[blocks.place]  # [N, c, E]
    return (each * shares[..., None]).sum(1).astype(x.dtype)


def gated(gate: Float[Array, "..."], up: Float[Array, "..."], clamped: ClampedGate | None) -> Float[Array, "..."]:
    if clamped is None:
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, clamped.limit), jnp.clip(up, -clamped.limit, clamped.limit)
    return gate * jax.nn.sigmoid(clamped.alpha * gate) * (up + 1)


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
    x: Float[Array, "n m E"], weights: Float[Array, "X E F"], expert: Int[Array, " n"]
) -> Float[Array, "n m F"]:
    """Each block times the weights of its expert, float32.

    The gradient of the weights is added up in place: the one that JAX derives for a loop would write an array of the
    size of all weights for each block.
    """
    times = lambda block: _times(block[0], weights[block[1]])
    return jax.lax.map(times, (x, expert))


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


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
