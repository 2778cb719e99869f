"""Which tokens of a picture are chosen, as indices: `jaxcompress.state.select` with a number known to the compiler."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.select import keep_top, rank


def best(scores: Float[Array, "B N"], n: int, what: str = "tokens") -> Int[Array, "B n"]:
    """The n tokens with the highest scores, in the order in which they stand; of equals the earlier.

    Raises:
      ValueError: n is negative or above N.
    """
    check_budget(n, scores.shape[1], what)
    return standing(top(scores, n), n)


def best_first(scores: Float[Array, "B N"], n: int, what: str = "tokens") -> Int[Array, "B n"]:
    """The same tokens in the order of their scores."""
    check_budget(n, scores.shape[1], what)
    return order(scores)[:, :n]


def order(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """All tokens, the best first; of equals the earlier."""
    place = _places(scores)
    return jnp.put_along_axis(place, nth_best(scores), place, axis=1, inplace=False)


def nth_best(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """How many tokens of its row are better than each."""
    return rank(scores[:, None], _places(scores)[:, None])[:, 0]


def top(
    scores: Float[Array, "B N"], n: Int[Array, " B"] | int, among: Bool[Array, "B N"] | None = None
) -> Bool[Array, "B N"]:
    """Marks the n best of those that are `among` (all by default)."""
    place = _places(scores)
    place = place if among is None else jnp.where(among, place, -1)
    return keep_top(scores[:, None], place[:, None], jnp.reshape(n, (-1, 1)))[:, 0]


def standing(marked: Bool[Array, "B N"], n: int) -> Int[Array, "B n"]:
    """The indices of n marked tokens, ascending. Where fewer are marked, unmarked ones follow."""
    return jnp.argsort(~marked, axis=1, stable=True)[:, :n].astype(jnp.int32)


def marks(index: Int[Array, "B n"], total: int) -> Bool[Array, "B N"]:
    """Which of `total` tokens the indices name; those out of range name none."""
    rows = jnp.arange(index.shape[0])[:, None]
    return jnp.zeros((index.shape[0], total), bool).at[rows, index].set(True, mode="drop")


def others(index: Int[Array, "B n"], total: int) -> Int[Array, "B m"]:
    """The tokens that distinct indices do not name, ascending."""
    return standing(~marks(index, total), total - index.shape[1])


def take(x: Array, index: Int[Array, "B n"]) -> Array:
    """Tokens [B, N, ...] at indices: [B, n, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def cosine(x: Float[Array, "B N E"], y: Float[Array, "B M E"]) -> Float[Array, "B N M"]:
    """Cosines of all pairs, in full float32; a zero vector has cosine 0."""
    return jnp.einsum("bne,bme->bnm", unit(x), unit(y), precision="highest")


def unit(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def check_budget(n: int, total: int, what: str = "tokens") -> None:
    """Raises ValueError where n of `total` cannot be kept."""
    if not 0 <= n <= total:
        raise ValueError(f"cannot keep {n} of {total} {what}; give a number from 0 to {total}")


def _places(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    return jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
