"""Baselines that ignore the content: random, strided, even over the picture, and averages over the picture.

Every designed score has to beat them (Liu et al. 2025, "Shifting AI Efficiency From
Model-Centric to Data-Centric Compression", section 4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcompress.vision.choose import check_budget


def random_scores(seed: int, index: Int[Array, "*B N"]) -> Float[Array, "*B N"]:
    """One draw per token from the seed and the token's index only, so sets for growing budgets are nested."""
    key = jax.random.key(seed)
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i))
    return jnp.vectorize(draw)(jnp.maximum(index, 0))


def stride(total: int, n: int) -> Int[np.ndarray, " n"]:
    """Every (total / n)-th token, rounded down, starting at the first."""
    check_budget(n, total)
    return (np.arange(n) * total // max(n, 1)).astype(np.int32)


def cells(rows: int, columns: int, n: int) -> tuple[int, int]:
    """A grid of n cells that fits into the picture's grid, with cells as square as possible.

    Raises:
      ValueError: there is no such grid; the message names the nearest numbers that have one.
    """
    check_budget(n, rows * columns, "patches")
    fits = lambda m: [(a, m // a) for a in range(1, rows + 1) if m and not m % a and m // a <= columns]
    found = fits(n)
    if not found:
        near = sorted((m for m in range(1, rows * columns + 1) if fits(m)), key=lambda m: abs(m - n))[:4]
        raise ValueError(
            f"{n} cells do not lie in a grid inside {rows} x {columns} patches; the nearest numbers that do: {near}"
        )
    # Choose the least elongated cell.
    return min(found, key=lambda grid: abs(np.log((rows / grid[0]) / (columns / grid[1]))))


def cell_of(rows: int, columns: int, n: int) -> Int[np.ndarray, " patches"]:
    """The cell of each patch in raster order: the groups of `jaxcompress.vision.merging.grouped` (pooling)."""
    down, across = cells(rows, columns, n)
    row, column = np.arange(rows) * down // rows, np.arange(columns) * across // columns
    return (row[:, None] * across + column).reshape(-1).astype(np.int32)


def centres(rows: int, columns: int, n: int) -> Int[np.ndarray, " n"]:
    """The middle patch of each of n cells, ascending: evenly spaced over the picture in both directions."""
    down, across = cells(rows, columns, n)

    def middle(m: int, side: int) -> np.ndarray:
        first = -(-np.arange(m + 1) * side // m)  # first row or column of each cell, as in `cell_of`
        return (first[:-1] + first[1:]) // 2

    row, column = middle(down, rows), middle(across, columns)
    return (row[:, None] * columns + column).reshape(-1).astype(np.int32)
