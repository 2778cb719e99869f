"""FastV: after the second layer, drops the patches that the last token attends to least (Chen et al. 2024)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress.state.select import rank
from jaxcompress.vision.choose import rank_of

LAYER = 2
"""K as published: patches leave before layer K, by the attention of layer K - 1."""


def last_word(row: Float[Array, "B H V"]) -> Float[Array, "B V"]:
    """Scores: attention from the prompt's last token to each patch, mean over heads."""
    return row.mean(1)


def share_kept(patches: int, ratio: float) -> int:
    """Number of kept patches if a share `ratio` is dropped. As in the authors' code, `round` takes halves to even."""
    return round(patches * (1 - ratio))


def by_window(scores: Float[Array, "B V"], table: np.ndarray) -> Float[Array, "B V"]:
    """Window-FastV: scores by which every window keeps its best patch before any window keeps its second best.

    The baseline of "Token Pruning in Multimodal Large Language Models: Are We Solving the Right Problem?" (Wen et al.
    2025). The budget need not be a multiple of the number of windows; the remaining places go to the best patches.

    Args:
      table: [windows, patches of each] (see `jaxcompress.vision.windows.window_table`).
    """
    members = scores[:, table.reshape(-1)].reshape(scores.shape[0], *table.shape)
    place = jnp.broadcast_to(jnp.asarray(table), members.shape)
    nth = rank(members, place).reshape(scores.shape[0], -1)
    first = jnp.zeros(scores.shape, nth.dtype).at[:, table.reshape(-1)].set(nth)
    whole = rank_of(scores)
    return -(first * scores.shape[1] + whole).astype(jnp.float32)
