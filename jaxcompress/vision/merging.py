"""What merges: one way for every method.

A `Merging` says which tokens stay, which go, and into which of those that stay. `merge` averages them, each token
weighing as many as it stands for, so that the weighted mean over all tokens stays the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.policies.reductions.nearest import pour
from jaxcompress.vision.choose import indices_of, mask_of, take


class Merging(NamedTuple):
    """N tokens become n.

    Attributes:
      kept: [B, n], the tokens that stay, in the order of the result.
      gone: [B, m], tokens that go into one that stays.
      target: [B, m], index into the result; n for what is dropped.
    """

    kept: Int[Array, "B n"]
    gone: Int[Array, "B m"]
    target: Int[Array, "B m"]

    def into(self, total: int) -> Int[Array, "B N"]:
        """For each of N = `total` tokens its index in the result, -1 if it was dropped."""
        b, n = self.kept.shape
        rows, out = jnp.arange(b)[:, None], jnp.full((b, total), -1, jnp.int32)
        out = out.at[rows, self.gone].set(jnp.where(self.target < n, self.target, -1).astype(jnp.int32), mode="drop")
        return out.at[rows, self.kept].set(jnp.arange(n, dtype=jnp.int32))


def merge(
    x: Float[Array, "B N E"], size: Float[Array, "B N"] | None, how: Merging
) -> tuple[Float[Array, "B n E"], Float[Array, "B n"]]:
    """Means weighted by size, and the sizes they have; sizes are 1 by default.

    x_j <- (s_j x_j + sum s_i x_i) / (s_j + sum s_i)    over the tokens i that go into j
    """
    size = jnp.ones(x.shape[:2], jnp.float32) if size is None else size
    weights = take(size, how.gone)
    values = take(x, how.gone).astype(jnp.float32)
    # One head: `pour` has an axis for heads.
    total, more = (y[:, 0] for y in pour(how.target[:, None], weights[:, None], values[:, None], how.kept.shape[1]))
    own, x = take(size, how.kept), take(x, how.kept)
    out = own + more
    mean = (own[..., None] * x.astype(jnp.float32) + total) / jnp.maximum(out, 1e-12)[..., None]
    return jnp.where((more > 0)[..., None], mean.astype(x.dtype), x), out


def merge_in_place(
    x: Float[Array, "B N E"], size: Float[Array, "B N"], into: Int[Array, "B N"]
) -> tuple[Float[Array, "B N E"], Float[Array, "B N"]]:
    """Means as of `merge`, for rules that merge another number in each row: what went leaves size 0 behind.

    Args:
      into: which token each one goes into; itself for one that stays.
    """
    total, out = (y[:, 0] for y in pour(into[:, None], size[:, None], x[:, None].astype(jnp.float32), x.shape[1]))
    return (total / jnp.maximum(out, 1e-12)[..., None]).astype(x.dtype), out


def largest(x: Float[Array, "B N E"], how: Merging) -> Float[Array, "B n E"]:
    """The elementwise maximum of each group."""
    rows = jnp.arange(x.shape[0])[:, None]
    return take(x, how.kept).at[rows, how.target].max(take(x, how.gone), mode="drop")


def unmerge(x: Float[Array, "B n E"], how: Merging, total: int) -> Float[Array, "B N E"]:
    """Every one of N = `total` tokens gets what its group has; zeros for what was dropped."""
    into = how.into(total)
    return jnp.where((into >= 0)[..., None], take(x, jnp.maximum(into, 0)), 0)


def followed(first: Int[Array, "B N"], second: Int[Array, "B n"]) -> Int[Array, "B N"]:
    """Where tokens are after two merges, each given by `Merging.into`."""
    return jnp.where(first >= 0, take(second, jnp.maximum(first, 0)), -1)


def grouped(group: Int[Array, "B N"], n: int) -> Merging:
    """The merging in which all tokens of a group go into its first one. Groups are 0..n-1, none of them empty."""
    total = group.shape[1]
    place = jnp.arange(total)
    first = jnp.where(group[:, None] == jnp.arange(n)[:, None], place, total).min(-1).astype(jnp.int32)  # [B, n]
    gone = indices_of(~mask_of(first, total), total - n)
    return Merging(first, gone, take(group, gone))
