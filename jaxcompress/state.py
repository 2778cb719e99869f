"""The multi-state: keys and values in a fixed number of slots.

A transformer whose cache has a fixed number of slots is a recurrent network, and this is its state (Oren et al. 2024,
"Transformers are Multi-State RNNs"). It is a plain pytree: passed in, returned, donated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Stats = Any
"""A policy's own numbers per slot: a pytree of float32 arrays [L, B, P, S], or () for none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVState:
    """What consecutive layers of one capacity remember. Slots carry no order; `positions` says what is where.

    Attributes:
      keys, values: [L, B, K, S, D]. K is the number of query heads for policies that keep a set per query head.
        A key is cached rotated at its absolute position, unless positions are re-indexed (see `Placement`).
      positions: [L, B, P, S] int32, the position of each slot's token in its sequence, -1 for a free slot. P is 1 if
        all heads of a layer share one set of tokens, else K.
      stats: the policy's numbers per slot.
      seen: [B] int32, tokens read so far; the next token's position.
      layer: [L] int32, which layers of the model these are.
      capacity: how many slots may be occupied after a step (static). S is one more where the incoming token is seen
        beside as many others before one goes (see `Policy.slots`).
    """

    keys: Float[Array, "L B K S D"]
    values: Float[Array, "L B K S D"]
    positions: Int[Array, "L B P S"]
    stats: Stats
    seen: Int[Array, " B"]
    layer: Int[Array, " L"]
    capacity: int = field(metadata={"static": True})

    @property
    def sets(self) -> int:
        return self.positions.shape[-2]

    def occupancy(self) -> Int[Array, "L B P"]:
        """Occupied slots."""
        return (self.positions >= 0).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: what the state costs, whatever the length of the sequence."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def take(self, index: Int[Array, ""] | int) -> KVState:
        """One layer, as a stack of one."""
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0)
        return replace(self, layer=pick(self.layer), **jax.tree.map(pick, self.layered()))

    def put(self, index: Int[Array, ""] | int, one: KVState) -> KVState:
        """The stack with one layer replaced; `seen` stays."""
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=0)
        return replace(self, **jax.tree.map(write, self.layered(), one.layered()))

    def layered(self) -> dict[str, Any]:
        """The fields that have a slot axis."""
        return dict(keys=self.keys, values=self.values, positions=self.positions, stats=self.stats)


State = tuple[KVState, ...]
"""A whole model's state: one `KVState` for each run of consecutive layers with equal capacity."""


def empty(
    *, layers: range, batch: int, heads: int, sets: int, capacity: int, slots: int, head_dim: int, dtype: Any
) -> KVState:
    """A state without stats in which every slot is free.

    Args:
      layers: indices of the layers in the model.
      heads, sets: K and P.
      capacity, slots: how many may be occupied after a step, and how many are allocated.
    """
    n = len(layers)
    kv = (n, batch, heads, slots, head_dim)
    return KVState(
        keys=jnp.zeros(kv, dtype),
        values=jnp.zeros(kv, dtype),
        positions=jnp.full((n, batch, sets, slots), -1, jnp.int32),
        stats=(),
        seen=jnp.zeros(batch, jnp.int32),
        layer=jnp.arange(layers.start, layers.stop, dtype=jnp.int32),
        capacity=capacity,
    )


def with_stats(state: KVState, one_token: Any) -> KVState:
    """The state with zero stats for every slot, given the shapes [B, P, 1] and dtypes of one token's."""
    zeros = lambda x: jnp.zeros(state.positions.shape, x.dtype)
    return replace(state, stats=jax.tree.map(zeros, one_token))
