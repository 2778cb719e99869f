"""The positions that RoPE uses when tokens between the held ones have been evicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from jaxcompress.state.order import oldest_first
from jaxcompress.state.shapes import SlotPositions

Placement = Literal["absolute", "slot", "compact"]
"""The positions that RoPE uses for tokens.

  absolute  at their position in the sequence; keys are cached rotated (TOVA, H2O)
  slot      at their rank among the tokens held, so that no distance exceeds the capacity (StreamingLLM)
  compact   at re-indexed positions: the gap g between neighbours held becomes ln(ln(g)) if it is over 10 (Oren et al.
            2024, section 7.2)

Both re-indexings cache keys un-rotated and rotate them at every step.
"""


Rotate = Callable[[Float[Array, "... D"], Real[Array, "..."]], Float[Array, "... D"]]
"""(vectors, positions) -> vectors: the layer's position embedding."""


def rotation_factors(rotate: Rotate, width: int) -> Float[Array, " D"]:
    """What rotating multiplies the length of each channel by: the factor that some models put on cos and sin (YaRN) for
    the channels that they rotate, 1 for the others."""
    return rotate(jnp.ones(width), jnp.zeros(()))


def unrotated(rotate: Rotate, x: Float[Array, "... D"], positions: Real[Array, "..."]) -> Float[Array, "... D"]:
    """Vectors as they were before they were rotated to these positions."""
    # Rotating back multiplies by the factors once more.
    return rotate(x, -positions) / jnp.square(rotation_factors(rotate, x.shape[-1]))


MOST_COMPARED = 1024
"""Up to this number of tokens, ranks come from comparing all pairs, which is faster than sorting so few tokens."""


def place(held: SlotPositions, placement: Placement) -> Float[Array, "B P N"]:
    """Re-indexed positions of the tokens held (see `Placement`); the results for free slots have no meaning."""
    if placement == "absolute":
        return held.astype(jnp.float32)
    if placement == "slot" and held.shape[-1] <= MOST_COMPARED:
        age, slot = jnp.where(held >= 0, held, jnp.iinfo(jnp.int32).max), jnp.arange(held.shape[-1])
        one, other = age[..., None], age[..., None, :]
        return ((other < one) | (other == one) & (slot < slot[:, None])).sum(-1, dtype=jnp.float32)
    order = oldest_first(held)
    if placement == "slot":
        places = jnp.broadcast_to(jnp.arange(held.shape[-1], dtype=jnp.float32), held.shape)
    else:
        ordered = jnp.take_along_axis(held, order, axis=-1)
        gaps = jnp.diff(ordered, axis=-1, prepend=ordered[..., :1] * 0).astype(jnp.float32)
        squashed = jnp.where(gaps > 10, jnp.log(jnp.log(jnp.maximum(gaps, 11.0))), gaps)
        places = jnp.cumsum(jnp.maximum(squashed, 0.0), axis=-1)
    return jnp.put_along_axis(jnp.zeros(held.shape, jnp.float32), order, places, axis=-1, inplace=False)
