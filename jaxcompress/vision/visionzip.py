"""VisionZip: dominant patches as they are, the others summed up (Yang et al. 2024).

The patches that the class token looks at most stay. Of the others every so many-th is a seed, which the rest join by
the cosine of their keys. A contextual token is its seed *plus* the mean of what joined it, as the authors' code has it:
not an average, so that this does not conserve the mean as other mergers do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.vision.choose import check_budget, complement, cosine, take, top_indices
from jaxcompress.vision.merging import Merging


class Zipped(NamedTuple):
    """Result of `visionzip`.

    Attributes:
      x: [B, n + m, E], dominant tokens in raster order, then contextual ones.
      how: who went where.
    """

    x: Float[Array, "B n E"]
    how: Merging


SPLITS = {64: (54, 10), 128: (108, 20), 192: (162, 30)}
"""(dominant, contextual) as published; the class token is one of the dominant there."""


def seeds(rest: int, n: int) -> Int[Array, " n"]:
    """Which of the `rest` tokens are seeds: every (rest // n)-th, from the first on."""
    step = max(1, rest // n) if n else 1
    return jnp.arange(0, rest, step, dtype=jnp.int32)[:n]


def visionzip(
    x: Float[Array, "B N E"], scores: Float[Array, "B N"], keys: Float[Array, "B N D"], dominant: int, contextual: int
) -> Zipped:
    """Keeps `dominant` tokens by score and sums the rest up in `contextual` ones.

    Args:
      scores: attention of the class token; give a token +inf to have it among the dominant.
      keys: of the tower's last layer but one, mean over heads.

    Raises:
      ValueError: more tokens than there are.
    """
    check_budget(dominant + contextual, x.shape[1])
    kept = top_indices(scores, dominant)
    rest = complement(kept, x.shape[1])
    b, m = rest.shape
    if not contextual:
        return Zipped(take(x, kept), Merging(kept, rest, jnp.full(rest.shape, dominant)))
    seed = jnp.broadcast_to(seeds(m, contextual), (b, contextual))
    joins = complement(seed, m)
    centre, gone = take(rest, seed), take(rest, joins)
    to = cosine(take(keys, gone), take(keys, centre)).argmax(-1).astype(jnp.int32)
    share = (to[..., None] == jnp.arange(contextual)).astype(jnp.float32)
    count = jnp.maximum(share.sum(1), 1.0)
    joined = jnp.einsum("bgc,bge->bce", share, take(x, gone).astype(jnp.float32), precision="highest")
    summed = take(x, centre) + (joined / count[..., None]).astype(x.dtype)
    how = Merging(jnp.concatenate([kept, centre], axis=1), gone, to + dominant)
    return Zipped(jnp.concatenate([take(x, kept), summed], axis=1), how)
