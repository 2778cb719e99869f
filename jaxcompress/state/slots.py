"""Writing into slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def write_slots(old: Any, new: Any, layer: Int[Array, ""] | int, index: Int[Array, "B P M"]) -> Any:
    """Arrays [L, B, K or P, S, ...] with new entries [B, K or P, M, ...] in the slots `index` of a layer.

    Args:
      old, new: pytrees of such arrays.
      index: the slot of each entry; S for an entry that is written nowhere.
    """

    def write(old: Array, new: Array) -> Array:
        if new.ndim == 3 and index.shape[-1] == 1:  # one number per slot: a comparison is cheaper than a scatter
            here = jnp.arange(old.shape[3], dtype=index.dtype) == index
            return old.at[layer].set(jnp.where(here, new, old[layer]))
        rows, heads = jnp.indices(new.shape[:2], sparse=True)
        to = jnp.broadcast_to(index, new.shape[:3])
        return old.at[layer, rows[..., None], heads[..., None], to].set(new, mode="drop")

    return jax.tree.map(write, old, new)


def with_layer(stack: Any, layer: Int[Array, ""] | int, one: Any) -> Any:
    """Arrays [L, ...] with one layer replaced by arrays [...]; pytrees of such arrays."""
    return jax.tree.map(lambda x, y: x.at[layer].set(y), stack, one)
