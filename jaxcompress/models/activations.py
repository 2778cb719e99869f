"""Activations of encoders and towers."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact one (Hendrycks & Gimpel 2016), as torch computes it: jax's takes 1 - erf, twice as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
