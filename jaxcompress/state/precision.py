"""How attention multiplies where numbers are narrower than float32: one rule, for every path and for its gradient.

    scores   queries times keys, both as they are stored; summed, and scaled, in float32
    softmax  in float32
    output   weights, rounded to what values are stored in, times values; summed in float32, and rounded once, to what
             queries are stored in, when nothing is left to add

So a result is as far from the exact one as rounding the weights and the result itself makes it, whatever the number of
tokens. The gradient is not rounded on its way: products pass it on in float32, and it is rounded where it meets an
array that is narrower. Where one array is used by many blocks of queries, whose gradients add up, it is to be made
float32 before them (`wide`); products then round it as it is stored, which changes no number.

The kernels of `jaxcompress.pallas_kernels` follow the rule by themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def products(
    equation: str, q: Float[Array, "..."], keys: Float[Array, "..."], stored: Any = None
) -> Float[Array, "..."]:
    """Products of queries and keys, float32, not scaled.

    Args:
      equation: of `jnp.einsum`.
      stored: the dtype of keys that were made `wide`; their own by default.
    """
    return _product(equation, q, keys, jnp.promote_types(q.dtype, stored or keys.dtype))


def scores(equation: str, q: Float[Array, "..."], keys: Float[Array, "..."], stored: Any = None) -> Float[Array, "..."]:
    """What a softmax is taken of, float32: products of queries [..., D] and keys over the square root of D."""
    return products(equation, q, keys, stored) * q.shape[-1] ** -0.5


def weighted(
    equation: str, weights: Float[Array, "..."], values: Float[Array, "..."], stored: Any = None
) -> Float[Array, "..."]:
    """Sums of values by their weights, float32.

    Args:
      equation: of `jnp.einsum`.
      stored: the dtype of values that were made `wide`; their own by default.
    """
    return _product(equation, weights, values, jnp.dtype(stored or values.dtype))


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same numbers in float32, so that gradients which come back to them add up in float32."""
    return x.astype(jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _product(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    return _times(equation, a.astype(dtype), b.astype(dtype))


@_product.defjvp
def _(equation: str, dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """As of a product of exact numbers: rounding to `dtype` passes on what it gets."""
    a, b = (x.astype(dtype) for x in primals)
    return _times(equation, a, b), _times(equation, tangents[0], b) + _times(equation, a, tangents[1])


def _times(equation: str, a: Array, b: Array) -> Array:
    """float32. On a CPU narrow numbers are made wide first: XLA has no product of some shapes there (UNIMPLEMENTED:
    BF16 x BF16 = F32), and multiplies the others so itself."""
    mixed = partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if jnp.promote_types(a.dtype, b.dtype) == jnp.float32:
        return mixed(a, b)
    return jax.lax.platform_dependent(a, b, cpu=lambda a, b: mixed(wide(a), wide(b)), default=mixed)
