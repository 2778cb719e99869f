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
        # As `old.at[layer, rows, heads, index].set(new, mode="drop")`. The indices are iotas of the full shape, so that
        # the compiler sees that devices which share rows or heads write their own, and exchange nothing.
        shape = (*new.shape[:3], 1)
        rows, heads = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        first, last = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape) for x in (layer, index[..., None]))
        at = jax.lax.concatenate([first, rows, heads, last], 3)
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(3, new.ndim)), inserted_window_dims=(0, 1, 2, 3),
            scatter_dims_to_operand_dims=(0, 1, 2, 3),
        )  # fmt: skip
        return jax.lax.scatter(old, at, new.astype(old.dtype), dimensions, mode="drop")

    return jax.tree.map(write, old, new)


def with_layer(stack: Any, layer: Int[Array, ""] | int, one: Any) -> Any:
    """Arrays [L, ...] with one layer replaced by arrays [...]; pytrees of such arrays."""
    return jax.tree.map(lambda x, y: x.at[layer].set(y), stack, one)
