"""Norms and unit vectors whose gradients are finite at the zero vector."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-8
"""The smallest value that `norm` returns."""


def norm(x: Float[Array, "*B D"], eps: float = EPS) -> Float[Array, "*B"]:
    """Euclidean norms of vectors, at least eps. The bound is under the root, so that a zero vector has gradient 0."""
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), eps**2))


def unit(x: Float[Array, "*B D"], eps: float = EPS) -> Float[Array, "*B D"]:
    """Vectors divided by `norm`: of length 1, or shorter if the norm is below eps."""
    return x / norm(x, eps)[..., None]
