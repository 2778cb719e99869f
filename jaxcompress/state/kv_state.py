"""The multi-state: keys and values in a fixed number of slots.

A transformer whose cache has a fixed number of slots is a recurrent network, and this is its state (Oren et al. 2024,
"Transformers are Multi-State RNNs"). It is a plain pytree: passed in, returned, donated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.state.storage import Quantised, zeros

Stats = Any
"""A policy's own numbers per slot: a pytree of arrays [L, B, P, S, ...], or () for none."""

Memory = Any
"""A policy's own numbers per row: a pytree of arrays [L, B, ...], or () for none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVState:
    """The state of consecutive layers of equal capacity. Slots have no order; `positions` names each slot's token.

    Attributes:
      keys, values: [L, B, K, S, D], or quantised vectors of that shape (see `jaxcompress.state.storage`). K is the
        number of query heads for policies that keep a set per query head, and 1 where all heads share a pool of
        slots. A key is cached rotated at its absolute position, unless positions are re-indexed (see `Placement`).
      positions: [L, B, P, S] int32, the position of each slot's token in its sequence, -1 for a free slot. P is 1 if
        all heads of a layer share one set of tokens, else K.
      owner: [L, B, 1, S] int32, the kv head that owns the token in each slot of a pool; None if every head has its own
        slots.
      stats: the policy's statistics per slot.
      memory: the policy's statistics per row.
      seen: [B] int32, tokens read so far; the next token's position.
      layer: [L] int32, the indices of these layers in the model.
      capacity: the number of slots of a set that may be occupied after a step (static). S is larger if incoming tokens
        are added before another token is evicted (see `Policy.slots`).
      heads: the heads of these layers that the state holds (static); () for all. If the heads of a layer have different
        capacities, each part is a separate state.
    """

    keys: Float[Array, "L B K S D"] | Quantised
    values: Float[Array, "L B K S D"] | Quantised
    positions: Int[Array, "L B P S"]
    owner: Int[Array, "L B 1 S"] | None
    stats: Stats
    memory: Memory
    seen: Int[Array, " B"]
    layer: Int[Array, " L"]
    capacity: int = field(metadata={"static": True})
    heads: tuple[int, ...] = field(default=(), metadata={"static": True})

    @property
    def sets(self) -> int:
        return self.positions.shape[-2]

    @property
    def kv_heads(self) -> int:
        """K, for any storage format of the keys."""
        return jax.tree.leaves(self.keys)[0].shape[2]

    def occupancy(self) -> Int[Array, "L B P"]:
        """The number of occupied slots."""
        return (self.positions >= 0).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: the memory of the state, which does not depend on the length of the sequence."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def take(self, index: Int[Array, ""] | int) -> KVState:
        """One layer, as a stack of one."""
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0)
        return replace(self, layer=pick(self.layer), **jax.tree.map(pick, self.layered()))

    def put(self, index: Int[Array, ""] | int, one: KVState) -> KVState:
        """The stack with one layer replaced; `seen` is unchanged."""
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=0)
        return replace(self, **jax.tree.map(write, self.layered(), one.layered()))

    def slotted(self) -> dict[str, Any]:
        """The fields that have a slot axis."""
        return dict(keys=self.keys, values=self.values, positions=self.positions, owner=self.owner, stats=self.stats)

    def layered(self) -> dict[str, Any]:
        """The fields that belong to a layer: those with a slot axis, and the memory."""
        return dict(self.slotted(), memory=self.memory)


State = tuple[KVState, ...]
"""A whole model's state: one `KVState` for each run of consecutive layers with equal capacity and policy, or several if
the heads of these layers differ in capacity."""


def runs(state: State) -> Iterator[tuple[range, State]]:
    """The layers of each run, and the parts that hold them."""
    first, parts = 0, []
    for i, part in enumerate(state):
        parts.append(part)
        if i + 1 == len(state) or not part.heads or not state[i + 1].heads or 0 in state[i + 1].heads:
            layers = range(first, first + part.layer.shape[0])
            yield layers, tuple(parts)
            first, parts = layers.stop, []


def empty(  # ten parameters: each is one fact about the shape
    *, layers: range, batch: int, heads: int, sets: int, capacity: int, slots: int, head_dim: int, dtype: DTypeLike,
    which: tuple[int, ...] = (), pooled: bool = False,
) -> KVState:  # fmt: skip
    """A state without stats in which every slot is free.

    Args:
      layers: indices of the layers in the model.
      heads, sets: K and P.
      capacity, slots: the number of slots that may be occupied after a step, and the number allocated.
      dtype: the dtype of keys and values (see `jaxcompress.state.storage.DTYPES`).
      which: `KVState.heads`.
      pooled: whether all heads share one pool of slots.
    """
    n = len(layers)
    kv = (n, batch, heads, slots, head_dim)
    return KVState(
        keys=zeros(kv, dtype),
        values=zeros(kv, dtype),
        positions=jnp.full((n, batch, sets, slots), -1, jnp.int32),
        owner=jnp.zeros((n, batch, 1, slots), jnp.int32) if pooled else None,
        stats=(),
        memory=(),
        seen=jnp.zeros(batch, jnp.int32),
        layer=jnp.arange(layers.start, layers.stop, dtype=jnp.int32),
        capacity=capacity,
        heads=which,
    )


def with_numbers(state: KVState, stats: Any, memory: Any) -> KVState:
    """The state with zero stats for every slot and zero memory for every row.

    Args:
      stats: shapes [B, P, 1, ...] and dtypes of one token's stats.
      memory: shapes [B, ...] and dtypes of one layer's memory.
    """
    layers, slots = state.positions.shape[0], state.positions.shape[-1]
    per_slot = lambda x: jnp.zeros((layers, *x.shape[:2], slots, *x.shape[3:]), x.dtype)
    per_row = lambda x: jnp.zeros((layers, *x.shape), x.dtype)
    return replace(state, stats=jax.tree.map(per_slot, stats), memory=jax.tree.map(per_row, memory))
