"""The precision of products in attention for dtypes narrower than float32: one rule for all paths and gradients.

    scores   queries times keys, both as they are stored; summed, and scaled, in float32
    softmax  in float32
    output   weights, rounded to the dtype of stored values, times values; summed in float32, and rounded once, to the
             dtype of the queries, after the last addition

So the error of a result comes only from rounding the weights and the result, for any number of tokens. The gradient is
not rounded on its way: products pass it on in float32, and it is rounded only where it reaches a narrower array. If
many blocks of queries use one array, their gradients are summed, so the array must be made float32 before the blocks
(`wide`). Products then round it to its storage dtype, which changes no number.

The kernels of `jaxcompress.pallas_kernels` implement the same rule themselves.
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
      equation: the `jnp.einsum` equation.
      stored: the storage dtype of keys that were made `wide`; by default the dtype of `keys`.
    """
    return _product(equation, q, keys, jnp.promote_types(q.dtype, stored or keys.dtype))


def scores(equation: str, q: Float[Array, "..."], keys: Float[Array, "..."], stored: Any = None) -> Float[Array, "..."]:
    """Attention scores before the softmax, float32: products of queries [..., D] and keys over the square root of D."""
    return products(equation, q, keys, stored) * q.shape[-1] ** -0.5


def weighted(
    equation: str, weights: Float[Array, "..."], values: Float[Array, "..."], stored: Any = None
) -> Float[Array, "..."]:
    """Weighted sums of values, float32.

    Args:
      equation: the `jnp.einsum` equation.
      stored: the storage dtype of values that were made `wide`; by default the dtype of `values`.
    """
    return _product(equation, weights, values, jnp.dtype(stored or values.dtype))


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same numbers in float32, so that their gradients are summed in float32."""
    return x.astype(jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _product(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    return _times(equation, a.astype(dtype), b.astype(dtype))


@_product.defjvp
def _(equation: str, dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """The derivative of a product of exact numbers: rounding to `dtype` passes tangents on unchanged."""
    a, b = (x.astype(dtype) for x in primals)
    return _times(equation, a, b), _times(equation, tangents[0], b) + _times(equation, a, tangents[1])


def _times(equation: str, a: Array, b: Array) -> Array:
    """A product in float32. On a CPU, narrow inputs are converted to float32 first: XLA lacks the product for some
    shapes there (UNIMPLEMENTED: BF16 x BF16 = F32), and converts the inputs itself for the others."""
    mixed = partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if jnp.promote_types(a.dtype, b.dtype) == jnp.float32:
        return mixed(a, b)
    return jax.lax.platform_dependent(a, b, cpu=lambda a, b: mixed(wide(a), wide(b)), default=mixed)
