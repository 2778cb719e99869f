"""MustDrop, the vision-encoding stage: similar neighbours become one token (Liu et al. 2024, section 3.2).

The patches of a w x w window merge if they are similar, measured by the mean cosine of their pairs. The published rule
merges windows above a threshold. This module merges an exact number of windows, the most similar ones. It can also
merge by threshold; merged patches then leave empty places.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.models.patches import Patches
from jaxcompress.state.vectors import unit
from jaxcompress.vision.choose import EPS, check_budget, indices_of, ranked_indices, take, top_mask
from jaxcompress.vision.merging import Merging, merge_in_place
from jaxcompress.vision.tome import merged

THRESHOLD, WINDOW, LAYER = 0.8, 3, 0
"""As published: 3 x 3 windows with a mean cosine of at least 0.8 merge after the first layer of CLIP."""


def window_table(rows: int, columns: int, window: int) -> np.ndarray:
    """[windows, window * window]: the patches of each window in raster order, windows in raster order.

    Raises:
      ValueError: the windows do not tile the grid.
    """
    if window < 1 or rows % window or columns % window:
        fit = [w for w in range(2, min(rows, columns) + 1) if not rows % w and not columns % w]
        hint = f"give one of {fit}" if fit else "no window fits"
        raise ValueError(f"windows of {window} x {window} do not tile a grid of {rows} x {columns} patches; {hint}")
    place = np.arange(rows * columns).reshape(rows // window, window, columns // window, window)
    return place.swapaxes(1, 2).reshape(-1, window * window).astype(np.int32)


def square(patches: int) -> int:
    """The side of a square grid with this number of patches. Raises ValueError if the number is not a square."""
    side = int(patches**0.5 + 0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches are no square grid; give its rows and columns")
    return side


def window_similarity(x: Float[Array, "B N E"], table: np.ndarray) -> Float[Array, "B W"]:
    """Mean cosine over pairs of different patches in each window; 1 for windows of one patch."""
    members = unit(x[:, table.reshape(-1)].astype(jnp.float32), EPS).reshape(x.shape[0], *table.shape, x.shape[-1])
    w = table.shape[1]
    if w == 1:
        return jnp.ones(members.shape[:2])
    # The sum over all pairs of products is the square of the sum.
    total, own = jnp.square(members.sum(2)).sum(-1), jnp.square(members).sum((2, 3))
    return (total - own) / (w * (w - 1))


def windows_above(similarity: Float[Array, "B W"], threshold: float = THRESHOLD) -> Int[Array, " B"]:
    """Number of windows that the published rule merges per picture. The authors' code uses the minimum over a batch."""
    return (similarity >= threshold).sum(-1)


def merge_windows(
    similarity: Float[Array, "B W"], table: np.ndarray, r: int, *, special: int = 1, similar_first: bool = False
) -> Merging:
    """Merges the patches of each of the r most similar windows into its middle patch.

    The result is [special tokens | patches in raster order], so the remaining patches keep their relative order. With
    `similar_first` the order is that of the authors' code: [special | merged, most similar first | others in raster
    order].

    Args:
      table: patches of each window, special tokens not counted (see `window_table`).
      special: number of tokens before the patches; they do not merge.

    Raises:
      ValueError: r is not in 0..W.
    """
    check_budget(r, table.shape[0], "windows")
    b, size, total = similarity.shape[0], table.shape[1], table.size
    middle, around = table[:, size // 2], np.delete(table, size // 2, axis=1)
    chosen = ranked_indices(similarity, r)
    centre = jnp.asarray(middle)[chosen]  # [B, r]
    gone = jnp.asarray(around)[chosen].reshape(b, -1)
    merges = jnp.zeros(similarity.shape, bool).at[jnp.arange(b)[:, None], chosen].set(True)
    window_of = np.zeros(total, np.int32)
    window_of[table.reshape(-1)] = np.repeat(np.arange(len(table)), size)
    stays = ~merges[:, window_of]  # patches of windows that do not merge
    n = total - r * (size - 1)
    if similar_first:
        kept = jnp.concatenate([centre, indices_of(stays, total - r * size)], axis=1)
    else:
        kept = indices_of(stays.at[jnp.arange(b)[:, None], centre].set(True), n)
    into = jnp.zeros((b, total), jnp.int32).at[jnp.arange(b)[:, None], kept].set(jnp.arange(n, dtype=jnp.int32))
    target = jnp.repeat(take(into, centre), size - 1, axis=1)
    first = jnp.broadcast_to(jnp.arange(special, dtype=jnp.int32), (b, special))
    return Merging(jnp.concatenate([first, kept + special], axis=1), gone + special, target + special)


def spatial(patches: Patches, r: int, *, grid: int, special: int, window: int = WINDOW) -> Patches:
    """Applies the stage to a tower's tokens: exactly r windows merge.

    Raises:
      ValueError: the windows do not tile the grid, or there are fewer than r.
    """
    table = window_table(grid, grid, window)
    similarity = window_similarity(patches.hidden[:, special:], table)
    return merged(patches, merge_windows(similarity, table, r, special=special))


def spatial_above(
    patches: Patches, threshold: float = THRESHOLD, *, grid: int, special: int, window: int = WINDOW
) -> Patches:
    """The published rule with fixed shapes: every window at or above the threshold merges and leaves empty places.

    The number of tokens does not change. A patch that merged into another has size 0, and no token attends to it.
    """
    table = window_table(grid, grid, window)
    b, total = patches.hidden.shape[0], table.size
    merges = window_similarity(patches.hidden[:, special:], table) >= threshold
    middle = table[:, table.shape[1] // 2]
    centre_of = np.zeros(total, np.int32)
    centre_of[table.reshape(-1)] = np.repeat(middle, table.shape[1])
    window_of = np.zeros(total, np.int32)
    window_of[table.reshape(-1)] = np.repeat(np.arange(len(table)), table.shape[1])
    place = jnp.arange(total, dtype=jnp.int32)
    into = jnp.where(merges[:, window_of], centre_of, place)  # [B, patches]
    everything = jnp.broadcast_to(jnp.arange(special + total, dtype=jnp.int32), (b, special + total))
    into = jnp.concatenate([everything[:, :special], into + special], axis=1)
    x, size = merge_in_place(patches.hidden, patches.size, into)
    return patches.become(x, size, into)


def key_count(patches: int, share: float = 0.08) -> int:
    """Number of key tokens: by default 8 % of the patches, rounded up."""
    return int(-(-share * patches // 1))


def key_tokens(attention: Float[Array, "B H N"], n: Int[Array, " B"] | int) -> Bool[Array, "B N"]:
    """Marks the patches that later stages drop last: those with the most attention of the class token.

    Args:
      attention: from the class token to the patches in the tower's last layer (without special tokens).
      n: number of key tokens (see `key_count`), one number or one for each row.
    """
    return top_mask(attention.mean(1), n)
