"""FastV: after the second layer, patches go that the last word of the prompt does not look at (Chen et al. 2024)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress.state.select import rank
from jaxcompress.vision.choose import rank_of

LAYER = 2
"""K as published: patches leave before layer K, by the attention of layer K - 1."""


def last_word(row: Float[Array, "B H V"]) -> Float[Array, "B V"]:
    """Scores: the attention of the prompt's last token to each patch, mean over heads."""
    return row.mean(1)


def share_kept(patches: int, ratio: float) -> int:
    """How many stay where a share `ratio` goes: `round`, which takes halves to the even number, as the authors do."""
    return round(patches * (1 - ratio))


def by_window(scores: Float[Array, "B V"], table: np.ndarray) -> Float[Array, "B V"]:
    """Scores by which every window keeps its best before any keeps its second best: Window-FastV.

    The baseline of "Token Pruning in Multimodal Large Language Models: Are We Solving the Right Problem?" (Wen et al.
    2025), for a number that the windows need not divide: what is left over goes to the best.

    Args:
      table: [windows, patches of each] (see `jaxcompress.vision.windows.window_table`).
    """
    members = scores[:, table.reshape(-1)].reshape(scores.shape[0], *table.shape)
    place = jnp.broadcast_to(jnp.asarray(table), members.shape)
    nth = rank(members, place).reshape(scores.shape[0], -1)
    first = jnp.zeros(scores.shape, nth.dtype).at[:, table.reshape(-1)].set(nth)
    whole = rank_of(scores)
    return -(first * scores.shape[1] + whole).astype(jnp.float32)
