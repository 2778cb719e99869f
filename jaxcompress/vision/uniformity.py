"""How evenly kept tokens lie over a picture and over the frames of a video, and which places are favoured.

A designed score may look at the same corner of every picture; a random one cannot. The position paper (Liu et al.
2025, section 4) holds that tokens kept evenly over space and time often serve better than tokens that attention chose,
and that attention favours the end of the sequence. These are the numbers to see it by.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

Kept = Bool[Array, "*B N"]
"""Which patches of each picture stayed, in raster order."""


def evenness(shares: Float[Array, "*B N"], most: Real[Array, "*B"] | float | None = None) -> Float[Array, "*B"]:
    """Entropy of how something is shared among N places, by the largest there could be: 1 even, 0 all in one place.

    Args:
      shares: at least 0; they need not sum to 1. Rows of zeros have evenness 1.
      most: places that could have a share, if fewer than N.
    """
    total = shares.sum(-1, keepdims=True)
    p = shares / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
    places = jnp.minimum(shares.shape[-1], shares.shape[-1] if most is None else most)
    largest = jnp.log(jnp.maximum(places, 1).astype(jnp.float32))
    return jnp.where((total[..., 0] > 0) & (largest > 0), entropy / jnp.where(largest > 0, largest, 1.0), 1.0)


def spatial_evenness(kept: Kept, grid: tuple[int, int], windows: int = 4) -> Float[Array, "*B"]:
    """Evenness of kept patches over windows x windows parts of the picture, of equal size but for rounding.

    Raises:
      ValueError: patches that are no grid, or more windows than rows or columns.
    """
    rows, columns = grid
    _check_grid(kept, grid)
    if not 1 <= windows <= min(grid):
        raise ValueError(f"{windows} windows do not fit along {rows} x {columns} patches")
    part = np.add.outer(np.arange(rows) * windows // rows * windows, np.arange(columns) * windows // columns).reshape(
        -1
    )
    counts = kept.astype(jnp.float32) @ (part[:, None] == np.arange(windows**2)).astype(np.float32)
    # Windows of unequal size have equal shares if as much of each is kept.
    shares = counts / jnp.asarray(np.bincount(part, minlength=windows**2), jnp.float32)
    return evenness(shares, most=kept.sum(-1))


def temporal_evenness(kept: Bool[Array, "*B F N"]) -> Float[Array, "*B"]:
    """Evenness of kept patches over the F frames of a video."""
    counts = kept.sum(-1).astype(jnp.float32)
    return evenness(counts, most=counts.sum(-1))


def gap(kept: Kept, grid: tuple[int, int]) -> Float[Array, "*B"]:
    """Mean distance, in patches, from every patch of the picture to the nearest kept one; infinite where none was kept.

    Raises:
      ValueError: patches that are no grid.
    """
    _check_grid(kept, grid)
    place = np.stack(np.unravel_index(np.arange(grid[0] * grid[1]), grid), -1)
    apart = np.sqrt(np.square(place[:, None] - place).sum(-1)).astype(np.float32)
    return jnp.where(kept[..., None, :], apart, jnp.inf).min(-1).mean(-1)


def heat(kept: Bool[Array, "B N"], grid: tuple[int, int]) -> Float[Array, "rows columns"]:
    """How often each place was kept, over pictures.

    Raises:
      ValueError: patches that are no grid.
    """
    _check_grid(kept, grid)
    return kept.astype(jnp.float32).mean(0).reshape(grid)


def position_bias(kept: Bool[Array, "B N"]) -> Float[Array, ""]:
    """Share of what is kept that would have to move for every place to be kept equally often: 0 fair, near 1 always the
    same few. Chance alone gives about sqrt((1/n - 1/N) N / (2 pi B)) for n of N in B pictures: compare with random.
    """
    often = kept.astype(jnp.float32).sum(0)
    return jnp.abs(often / often.sum() - 1 / kept.shape[1]).sum() / 2


def end_bias(kept: Kept) -> Float[Array, "*B"]:
    """Mean place of the kept tokens in the sequence, from -1 (all at the start) over 0 to 1 (all at the end)."""
    n = kept.shape[-1]
    place = jnp.linspace(-1.0, 1.0, n)
    return (kept * place).sum(-1) / jnp.maximum(kept.sum(-1), 1)


def _check_grid(kept: Array, grid: Sequence[int]) -> None:
    if kept.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"{kept.shape[-1]} patches are no grid of {grid[0]} x {grid[1]}")
