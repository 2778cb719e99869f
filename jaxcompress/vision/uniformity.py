"""Measures how evenly kept tokens lie over a picture and over video frames, and which places are favoured.

A designed score may favour the same corner of every picture; a random score cannot. The position paper (Liu et al.
2025, section 4) claims that tokens kept evenly over space and time often work better than tokens chosen by attention,
and that attention favours the end of the sequence. These functions measure evenness and this bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

Kept = Bool[Array, "*B N"]
"""Which patches of each picture stayed, in raster order."""


def evenness(shares: Float[Array, "*B N"], most: Real[Array, "*B"] | float | None = None) -> Float[Array, "*B"]:
    """Entropy of shares over N places, relative to the largest possible entropy: 1 is even, 0 is all in one place.

    Args:
      shares: non-negative; they need not sum to 1. Rows of zeros have evenness 1.
      most: number of places that can have a share, if fewer than N.
    """
    total = shares.sum(-1, keepdims=True)
    p = shares / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
    places = jnp.minimum(shares.shape[-1], shares.shape[-1] if most is None else most)
    largest = jnp.log(jnp.maximum(places, 1).astype(jnp.float32))
    return jnp.where((total[..., 0] > 0) & (largest > 0), entropy / jnp.where(largest > 0, largest, 1.0), 1.0)


def spatial_evenness(kept: Kept, grid: tuple[int, int], windows: int = 4) -> Float[Array, "*B"]:
    """Evenness of kept patches over windows x windows parts of the picture, of equal size up to rounding.

    Raises:
      ValueError: the patches do not form the grid, or there are more windows than rows or columns.
    """
    rows, columns = grid
    _check_grid(kept, grid)
    if not 1 <= windows <= min(grid):
        raise ValueError(f"{windows} windows do not fit along {rows} x {columns} patches")
    part = np.add.outer(np.arange(rows) * windows // rows * windows, np.arange(columns) * windows // columns).reshape(
        -1
    )
    counts = kept.astype(jnp.float32) @ (part[:, None] == np.arange(windows**2)).astype(np.float32)
    # Divide by window size: windows with the same kept fraction have equal shares.
    shares = counts / jnp.asarray(np.bincount(part, minlength=windows**2), jnp.float32)
    return evenness(shares, most=kept.sum(-1))


def temporal_evenness(kept: Bool[Array, "*B F N"]) -> Float[Array, "*B"]:
    """Evenness of kept patches over the F frames of a video."""
    counts = kept.sum(-1).astype(jnp.float32)
    return evenness(counts, most=counts.sum(-1))


def gap(kept: Kept, grid: tuple[int, int]) -> Float[Array, "*B"]:
    """Mean distance, in patches, from every patch of the picture to the nearest kept one; infinite if none was kept.

    Raises:
      ValueError: the patches do not form the grid.
    """
    _check_grid(kept, grid)
    place = np.stack(np.unravel_index(np.arange(grid[0] * grid[1]), grid), -1)
    apart = np.sqrt(np.square(place[:, None] - place).sum(-1)).astype(np.float32)
    return jnp.where(kept[..., None, :], apart, jnp.inf).min(-1).mean(-1)


def heat(kept: Bool[Array, "B N"], grid: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Fraction of pictures in which each place was kept.

    Raises:
      ValueError: the patches do not form the grid.
    """
    _check_grid(kept, grid)
    return kept.astype(jnp.float32).mean(0).reshape(grid)


def position_bias(kept: Bool[Array, "B N"]) -> Float[Array, ""]:
    """Share of kept tokens that would have to move so that every place is kept equally often.

    0 means no bias, or that none was kept; near 1, the same few places are always kept. Chance alone gives about
    sqrt((1/n - 1/N) N / (2 pi B)) for n of N tokens in B pictures: compare with a random choice.
    """
    often = kept.astype(jnp.float32).sum(0)
    total = often.sum()
    return jnp.where(total > 0, jnp.abs(often / jnp.maximum(total, 1) - 1 / kept.shape[1]).sum() / 2, 0.0)


def end_bias(kept: Kept) -> Float[Array, "*B"]:
    """Mean position of the kept tokens in the sequence: -1 is all at the start, 0 balanced, 1 all at the end."""
    n = kept.shape[-1]
    place = jnp.linspace(-1.0, 1.0, n)
    return (kept * place).sum(-1) / jnp.maximum(kept.sum(-1), 1)


def _check_grid(kept: Array, grid: Sequence[int]) -> None:
    if kept.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"{kept.shape[-1]} patches are no grid of {grid[0]} x {grid[1]}")
