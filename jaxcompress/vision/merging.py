"""Merges of tokens, in one form for every method.

A `Merging` says which tokens stay, which go, and which remaining token each one goes into. `merge` averages them. Each
token's weight is the number of tokens it stands for, so the weighted mean over all tokens does not change.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.policies.reductions.nearest import pour
from jaxcompress.vision.choose import indices_of, mask_of, take


class Merging(NamedTuple):
    """A merge of N tokens into n.

    Attributes:
      kept: [B, n], the tokens that stay, in the order of the result.
      gone: [B, m], tokens that go into one that stays.
      target: [B, m], index into the result; n for a dropped token.
    """

    kept: Int[Array, "B n"]
    gone: Int[Array, "B m"]
    target: Int[Array, "B m"]

    def into(self, total: int) -> Int[Array, "B N"]:
        """Index into the result for each of N = `total` tokens, -1 for a dropped token."""
        b, n = self.kept.shape
        rows, out = jnp.arange(b)[:, None], jnp.full((b, total), -1, jnp.int32)
        out = out.at[rows, self.gone].set(jnp.where(self.target < n, self.target, -1).astype(jnp.int32), mode="drop")
        return out.at[rows, self.kept].set(jnp.arange(n, dtype=jnp.int32))


def merge(
    x: Float[Array, "B N E"], size: Float[Array, "B N"] | None, how: Merging
) -> tuple[Float[Array, "B n E"], Float[Array, "B n"]]:
    """Returns means weighted by size, and the new sizes. Sizes are 1 by default.

    x_j <- (s_j x_j + sum s_i x_i) / (s_j + sum s_i)    over the tokens i that go into j
    """
    size = jnp.ones(x.shape[:2], jnp.float32) if size is None else size
    weights = take(size, how.gone)
    values = take(x, how.gone).astype(jnp.float32)
    # `pour` has an axis for heads; use one head.
    total, more = (y[:, 0] for y in pour(how.target[:, None], weights[:, None], values[:, None], how.kept.shape[1]))
    own, x = take(size, how.kept), take(x, how.kept)
    out = own + more
    mean = (own[..., None] * x.astype(jnp.float32) + total) / jnp.maximum(out, 1e-12)[..., None]
    return jnp.where((more > 0)[..., None], mean.astype(x.dtype), x), out


def merge_in_place(
    x: Float[Array, "B N E"], size: Float[Array, "B N"], into: Int[Array, "B N"]
) -> tuple[Float[Array, "B N E"], Float[Array, "B N"]]:
    """Like `merge`, for rules whose number of merges varies by row. A token that merged leaves size 0 in its place.

    Args:
      into: the token that each token goes into; itself for a token that stays.
    """
    total, out = (y[:, 0] for y in pour(into[:, None], size[:, None], x[:, None].astype(jnp.float32), x.shape[1]))
    return (total / jnp.maximum(out, 1e-12)[..., None]).astype(x.dtype), out


def largest(x: Float[Array, "B N E"], how: Merging) -> Float[Array, "B n E"]:
    """The elementwise maximum of each group."""
    rows = jnp.arange(x.shape[0])[:, None]
    return take(x, how.kept).at[rows, how.target].max(take(x, how.gone), mode="drop")


def unmerge(x: Float[Array, "B n E"], how: Merging, total: int) -> Float[Array, "B N E"]:
    """Each of N = `total` tokens gets the value of its group; dropped tokens get zeros."""
    into = how.into(total)
    return jnp.where((into >= 0)[..., None], take(x, jnp.maximum(into, 0)), 0)


def followed(first: Int[Array, "B N"], second: Int[Array, "B n"]) -> Int[Array, "B N"]:
    """Indices of tokens after two merges, each given by `Merging.into`."""
    return jnp.where(first >= 0, take(second, jnp.maximum(first, 0)), -1)


def grouped(group: Int[Array, "B N"], n: int) -> Merging:
    """The merge of every group into its first token. Groups are 0..n-1; none is empty."""
    total = group.shape[1]
    place = jnp.arange(total)
    first = jnp.where(group[:, None] == jnp.arange(n)[:, None], place, total).min(-1).astype(jnp.int32)  # [B, n]
    gone = indices_of(~mask_of(first, total), total - n)
    return Merging(first, gone, take(group, gone))
