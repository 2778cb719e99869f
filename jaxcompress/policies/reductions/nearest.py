"""The kept token that is most similar to an evicted one, and sums over what goes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.policies.cache_view import CacheView, Evicted
from jaxcompress.state.order import age_key, first_by
from jaxcompress.state.vectors import norm, unit

BLOCK = 128  # evicted tokens compared at once with what stays: bounds the memory of a one-shot prompt


class Nearest(NamedTuple):
    """For each evicted token the kept token whose key is most similar.

    Attributes:
      target: its slot, [B, K, M]; the oldest of equals.
      cosine: [B, K, M], 0 where nothing was found.
      found: [B, K, M] bool, False for what is no token, and where nothing stays.
    """

    target: Int[Array, "B K M"]
    cosine: Float[Array, "B K M"]
    found: Bool[Array, "B K M"]


def nearest(held: CacheView, gone: Evicted) -> Nearest:
    """Compares keys as they are cached, by cosine."""
    kept, scale = held.positions >= 0, 1 / norm(held.keys)[:, :, None]
    age = age_key(held.positions)[:, :, None]

    def block(carry: Any, keys: Array) -> Any:
        like = jnp.einsum("bkmd,bknd->bkmn", unit(keys), held.keys, precision="highest") * scale
        seen = jax.lax.stop_gradient(jnp.where(kept[:, :, None], like, -jnp.inf))
        target = first_by(-seen, jnp.broadcast_to(age, seen.shape))
        return carry, (target, jnp.take_along_axis(like, target[..., None], axis=-1)[..., 0])

    target, cosine = in_blocks(block, (), gone.keys)[1]
    found = (gone.positions >= 0) & kept.any(-1, keepdims=True)
    return Nearest(target, jnp.where(found, cosine, 0.0), found)


def pour(
    target: Int[Array, "B K M"], weight: Float[Array, "B K M"], values: Float[Array, "B K M D"], n: int
) -> tuple[Float[Array, "B K n D"], Float[Array, "B K n"]]:
    """Sums of weight * value and of weight over what goes into each of n places.

    As products with one-hot rows: unlike a scatter they add in the same order every time.

    Args:
      target: where each value goes; out of 0..n-1: nowhere.
    """
    places = jnp.arange(n)

    def block(sums: Any, parts: Any) -> Any:
        target, weight, values = parts
        return add_shares(sums, jnp.where(target[..., None] == places, weight[..., None], 0.0), values), ()

    b, k, _, d = values.shape
    nothing = jnp.zeros((b, k, n, d), jnp.float32), jnp.zeros((b, k, n), jnp.float32)
    return in_blocks(block, nothing, (target, weight, values))[0]


def add_shares(sums: tuple[Array, Array], share: Array, values: Array) -> tuple[Array, Array]:
    """share [B, K, m, N] of values [B, K, m, D]. Full precision: an accelerator would round the values otherwise."""
    total = jnp.einsum("bkmn,bkmd->bknd", share, values, precision="highest")
    return sums[0] + total, sums[1] + share.sum(2)


def in_blocks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, parts: Any) -> tuple[Any, Any]:
    """Scans over blocks of evicted tokens, axis 2 of all parts and results, so that no array of all pairs exists."""
    m = jax.tree.leaves(parts)[0].shape[2]
    if m <= BLOCK:
        return body(carry, parts)
    n = -(-m // BLOCK)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, n * BLOCK - m) if axis == 2 else (0, 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], n, BLOCK, *x.shape[3:]), 2, 0)

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], n * BLOCK, *x.shape[4:])[:, :, :m]

    carry, results = jax.lax.scan(body, carry, jax.tree.map(cut, parts))
    return carry, jax.tree.map(whole, results)
