"""Products with quantised vectors: codes are multiplied and summed first, then scaled."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.state.precision import products, weighted
from jaxcompress.state.storage import Quantised, parts


def code_scores(q: Float[Array, "B K G D"], keys: Quantised) -> Float[Array, "B K G S"]:
    """Attention scores before the softmax: products of queries and keys, divided by the square root of D."""
    codes, scale = parts(keys)
    assert scale is not None
    pairs = zip(jnp.split(q, len(codes), axis=-1), codes, strict=True)
    first, *rest = [products("bkgd,bksd->bkgs", a, b) for a, b in pairs]
    return sum(rest, first) * q.shape[-1] ** -0.5 * scale[:, :, None]


def code_sum(weights: Float[Array, "B K G S"], values: Quantised) -> Float[Array, "B K G D"]:
    """Weighted sums of the values."""
    codes, scale = parts(values)
    assert scale is not None
    return jnp.concatenate([weighted("bkgs,bksd->bkgd", weights * scale[:, :, None], x) for x in codes], axis=-1)
