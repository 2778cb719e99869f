"""What a policy sees of a layer, and what it gives back: plain tuples of arrays."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.placement import Placement, Rotate
from jaxcompress.state.shapes import Positions, SlotPositions, Weights

Scope = Literal["layer", "kv_head", "query_head", "pool"]
"""Who shares a set of tokens.

  layer       all heads of a layer hold the same tokens
  kv_head     every kv head holds its own
  query_head  every query head holds its own; the state is H / K times larger
  pool        the kv heads of a layer share a pool of slots; how many each holds follows from the scores (AdaKV)
"""


class LayerContext(NamedTuple):
    """What a policy may know of the layer in which it works.

    Attributes:
      rotate: the model's position embedding.
      placement: where tokens stand for it; keys are cached rotated if this is `absolute`.
      out: [K, G, D, E], the output projection of each query head; None where there is no model around.
      heads: H and K of the layer, or of the part of it that has these slots.
      which: the indices of the state's heads in the layer.
      traits: what the layer's attention does beyond scaled products and a softmax.
      layers: how many the model has; None where that is not known.
    """

    rotate: Rotate
    placement: Placement
    out: Float[Array, "K G D E"] | None
    heads: tuple[int, int]
    which: tuple[int, ...]
    traits: AttentionTraits = PLAIN
    layers: int | None = None

    @property
    def group(self) -> int:
        """G, query heads per kv head."""
        return self.heads[0] // self.heads[1]


class CacheView(NamedTuple):
    """The candidates of one layer, from which a policy chooses: its slots and, in a block, the tokens that come in.

    Free slots and padding are among the candidates, with position -1. Their keys, values and stats have no meaning;
    they are never chosen, whatever their scores. Slots stand in no order: what needs one sorts by position.

    Attributes:
      keys: [B, K, N, D], as they are cached: rotated to their positions, unless `context.placement` re-indexes them
        (`slot`, `compact`), where they are un-rotated.
      values: [B, K, N, D], as they are cached.
      positions: [B, P, N] int32, in the sequence; -1 for a free slot or padding.
      owner: [B, 1, N] int32 in a pool, the kv head of each candidate; else None.
      seen: [B] int32, how many tokens were read before this block.
      layer: index of the layer in the model, a scalar.
      memory: the policy's numbers per row, [B, ...].
      capacity: how many tokens of a set stay after a selection; in a pool, of all heads together.
      context: what else may be known of the layer.
    """

    keys: Float[Array, "B K N D"]
    values: Float[Array, "B K N D"]
    positions: SlotPositions
    owner: Int[Array, "B 1 N"] | None
    seen: Int[Array, " B"]
    layer: Int[Array, ""]
    memory: Memory
    capacity: int
    context: LayerContext

    @property
    def occupied(self) -> Array:
        """[B, P, N] bool."""
        return self.positions >= 0

    @property
    def per_set(self) -> int:
        """Capacity per head: in a pool the mean."""
        return self.capacity if self.owner is None else self.capacity // self.context.heads[1]

    @property
    def newest(self) -> Array:
        """[B, P, 1] int32, the newest position held."""
        return self.positions.max(-1, keepdims=True)

    def among(self, first: int, recent: int) -> Array:
        """[B, P, N] bool, True for the `first` tokens of the sequence and the `recent` newest ones; either may be 0."""
        return (self.positions < first) | (self.positions > self.newest - recent)


class Observation(NamedTuple):
    """What one attention call over a block of T queries showed.

    Attributes:
      weights: [B, K, G, T, N] float32, attention probabilities. They are zero for padded queries and, in a pool,
        between queries and keys of different heads.
      queries: [B, T] int32, positions of the queries, -1 for padding.
      visible: [B, P, T] float32, how many candidates each query saw; in a pool the mean over its heads.
      group: query heads per kv head.
      every: n where only queries at multiples of n are watched (see `sampled`); None where all are. The others have no
        weights, and are -1 in `queries`.
      present: [B, T] int32, the positions of all queries, watched or not; None where all are watched.
    """

    weights: Weights
    queries: Positions
    visible: Float[Array, "B P T"]
    group: int
    every: int | None = None
    present: Positions | None = None

    def per_set(self, scope: Scope) -> Float[Array, "B P T N"]:
        """Probabilities averaged over the heads that share a set."""
        if scope == "layer":
            # A product with ones: as fast as slices on a CPU, and devices that share the kv heads exchange one sum.
            ones = jnp.ones(self.weights.shape[1])
            total = jnp.einsum("bktn,k->btn", _added(self.weights, 2), ones, precision="highest")
            return total[:, None] / (self.weights.shape[1] * self.weights.shape[2])
        # In a pool only the queries of a key's own head have given it any.
        return _added(self.weights, 2) / (self.group if scope == "pool" else self.weights.shape[2])

    def total(self, scope: Scope) -> Float[Array, "B P N"]:
        """`per_set`, summed over the queries in one pass."""
        per_head = self.weights.sum((2, 3)) / (self.group if scope == "pool" else self.weights.shape[2])
        return per_head.mean(1, keepdims=True) if scope == "layer" else per_head

    def last(self, per_query: Float[Array, "B P T N"]) -> tuple[Float[Array, "B P N"], Array]:
        """The row of the newest query, and whether there is one: [B, P, N] and [B, 1, 1] bool."""
        newest = self.queries.argmax(-1)
        row = jnp.take_along_axis(per_query, newest[:, None, None, None], axis=2)[:, :, 0]
        return row, (self.queries.max(-1) >= 0)[:, None, None]


def _added(x: Array, axis: int) -> Array:
    """The sum over a short axis, slice by slice: one elementwise pass. XLA's reduction over heads takes three times as
    long as attention itself on a CPU."""
    return reduce(add, (jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])))


class IncomingTokens(NamedTuple):
    """The tokens that come in, before RoPE.

    Attributes:
      q: [B, T, H, D].
      k, v: [B, T, K, D].
      positions: [B, T] int32, -1 for padding.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    positions: Positions


class Entering(NamedTuple):
    """What goes into slots when tokens come in.

    Attributes:
      k, v: [B, T, K, D], before RoPE, in place of the tokens' own.
      replaces: [B, T, K] bool, True where a token takes the slot of the token before it; its k and v hold both.
      memory: as for the policy, after the tokens.
    """

    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    replaces: Array
    memory: Memory


class Evicted(NamedTuple):
    """Tokens that were just evicted, before their slots are used again.

    Attributes:
      keys, values: [B, K, M, D], as they were cached.
      positions: [B, P, M] int32, the newest first, -1 for nothing.
      stats: their stats, [B, P, M, ...].
      owner: [B, 1, M] int32 in a pool, the kv head of each token; else None.
    """

    keys: Float[Array, "B K M D"]
    values: Float[Array, "B K M D"]
    positions: Int[Array, "B P M"]
    stats: Stats
    owner: Int[Array, "B 1 M"] | None = None


class Absorbed(NamedTuple):
    """The layer after evicted tokens were merged into it.

    Attributes:
      values: [B, K, N, D].
      changed: [B, K, N] bool, True where values changed; only these are written.
      stats, memory: as for the policy.
    """

    values: Float[Array, "B K N D"]
    changed: Array
    stats: Stats
    memory: Memory
