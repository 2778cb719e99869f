"""Where tokens stand for RoPE once some between them are gone."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.base import Placement
from jaxcompress.shapes import SlotPositions


def place(held: SlotPositions, placement: Placement) -> Float[Array, "B P N"]:
    """Re-indexed positions of the tokens held (see `Placement`); what free slots get has no meaning."""
    if placement == "absolute":
        return held.astype(jnp.float32)
    order = jnp.argsort(jnp.where(held >= 0, held, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)
    if placement == "slot":
        places = jnp.broadcast_to(jnp.arange(held.shape[-1], dtype=jnp.float32), held.shape)
    else:
        ordered = jnp.take_along_axis(held, order, axis=-1)
        gaps = jnp.diff(ordered, axis=-1, prepend=ordered[..., :1] * 0).astype(jnp.float32)
        squashed = jnp.where(gaps > 10, jnp.log(jnp.log(jnp.maximum(gaps, 11.0))), gaps)
        places = jnp.cumsum(jnp.maximum(squashed, 0.0), axis=-1)
    return jnp.put_along_axis(jnp.zeros(held.shape, jnp.float32), order, places, axis=-1, inplace=False)
