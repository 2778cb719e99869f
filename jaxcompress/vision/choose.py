"""Which tokens of a picture are kept, as indices: `jaxcompress.state.select` with a number known to the compiler.

Only `rank` and `keep_top` of that module decide, so that ties and NaN are treated as everywhere in the library: of
equal tokens the earlier one stays.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.select import keep_top, rank
from jaxcompress.state.vectors import unit

EPS = 1e-12
"""The least norm that a vector is divided by in `cosine`."""


def top_indices(scores: Float[Array, "B N"], n: int, what: str = "tokens") -> Int[Array, "B n"]:
    """The n tokens with the highest scores, as ascending indices.

    Raises:
      ValueError: n is negative or above N.
    """
    check_budget(n, scores.shape[1], what)
    return indices_of(top_mask(scores, n), n)


def ranked_indices(scores: Float[Array, "B N"], n: int, what: str = "tokens") -> Int[Array, "B n"]:
    """The n tokens with the highest scores, the highest first.

    Raises:
      ValueError: n is negative or above N.
    """
    check_budget(n, scores.shape[1], what)
    return ranking(scores)[:, :n]


def ranking(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """All tokens, the one with the highest score first."""
    place = _places(scores)
    return jnp.put_along_axis(place, rank_of(scores), place, axis=1, inplace=False)


def rank_of(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """For each token, how many tokens of its row are better; 0 for the best."""
    return rank(scores[:, None], _places(scores)[:, None])[:, 0]


def top_mask(
    scores: Float[Array, "B N"], n: Int[Array, " B"] | int, among: Bool[Array, "B N"] | None = None
) -> Bool[Array, "B N"]:
    """Marks the n best tokens of each row.

    Args:
      n: one number, or one for each row.
      among: which tokens may be marked; all by default.
    """
    place = _places(scores)
    place = place if among is None else jnp.where(among, place, -1)
    return keep_top(scores[:, None], place[:, None], jnp.reshape(n, (-1, 1)))[:, 0]


def indices_of(mask: Bool[Array, "B N"], n: int) -> Int[Array, "B n"]:
    """The indices of n marked tokens, ascending. Where fewer are marked, unmarked ones follow."""
    return jnp.argsort(~mask, axis=1, stable=True)[:, :n].astype(jnp.int32)


def mask_of(index: Int[Array, "B n"], total: int) -> Bool[Array, "B N"]:
    """Marks the tokens, of `total`, that indices name. Indices out of range mark nothing."""
    rows = jnp.arange(index.shape[0])[:, None]
    return jnp.zeros((index.shape[0], total), bool).at[rows, index].set(True, mode="drop")


def complement(index: Int[Array, "B n"], total: int) -> Int[Array, "B m"]:
    """The tokens, of `total`, that distinct indices do not name, ascending."""
    return indices_of(~mask_of(index, total), total - index.shape[1])


def take(x: Array, index: Int[Array, "B n"]) -> Array:
    """Tokens [B, N, ...] at indices: [B, n, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def cosine(x: Float[Array, "B N E"], y: Float[Array, "B M E"]) -> Float[Array, "B N M"]:
    """Cosines of all pairs, in full float32. A zero vector has cosine 0 with every other."""
    x, y = (unit(z.astype(jnp.float32), EPS) for z in (x, y))
    return jnp.einsum("bne,bme->bnm", x, y, precision="highest")


def check_budget(n: int, total: int, what: str = "tokens") -> None:
    """Raises ValueError where n of `total` cannot be kept."""
    if not 0 <= n <= total:
        raise ValueError(f"cannot keep {n} of {total} {what}; give a number from 0 to {total}")


def _places(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    return jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
