"""Keys and queries at re-indexed positions, where keys are cached un-rotated."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.policies.cache_view import LayerContext


@runtime_checkable
class RotatesByRank(Protocol):
    """A `Rotate` that is cheaper for few whole-numbered positions."""

    def by_rank(self, x: Float[Array, "... D"], ranks: Int[Array, "..."], count: int) -> Float[Array, "... D"]:
        """Vectors rotated to whole positions below `count`."""
        ...


def rotated(
    x: Float[Array, "... D"], places: Float[Array, "..."], count: int, context: LayerContext
) -> Float[Array, "... D"]:
    """Vectors rotated to re-indexed positions; there are `count` such positions."""
    if context.placement == "slot" and isinstance(context.rotate, RotatesByRank):
        return context.rotate.by_rank(x, places.astype(jnp.int32), count)
    return context.rotate(x, places)
