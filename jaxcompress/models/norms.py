"""The normalisations of decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

NormKind = Literal["rms", "offset_rms", "layer"]
"""rms: RMSNorm (Zhang & Sennrich 2019). offset_rms: RMSNorm whose weights are distances from 1 (Gemma). layer:
LayerNorm with biases (Ba et al. 2016)."""


class OffsetRMSNorm(nnx.Module):
    """RMSNorm that multiplies by 1 + `scale`, in float32."""

    def __init__(self, width: int, *, epsilon: float, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def _layer_norm(width: int, *, epsilon: float, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits.
    return nnx.LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs)


NORMS: Mapping[NormKind, Callable[..., nnx.Module]] = {
    "rms": nnx.RMSNorm,
    "offset_rms": OffsetRMSNorm,
    "layer": _layer_norm,
}
"""(width, epsilon, param_dtype, rngs) -> the norm of this kind."""
