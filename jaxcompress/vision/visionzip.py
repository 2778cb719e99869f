"""VisionZip: dominant patches stay unchanged, the others are summarised (Yang et al. 2024).

The patches that get the most attention from the class token stay. Evenly spaced ones of the others are seeds; each
remaining token joins a seed by the cosine of their keys. As in the authors' code, a contextual token is its seed *plus*
the mean of the tokens that joined it. This is not an average, so unlike other merges it does not conserve the mean.
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
      how: which token went where.
    """

    x: Float[Array, "B n E"]
    how: Merging


SPLITS = {64: (54, 10), 128: (108, 20), 192: (162, 30)}
"""(dominant, contextual) as published; there, the class token counts as dominant."""


def seeds(rest: int, n: int) -> Int[Array, " n"]:
    """Indices of the seeds among the `rest` tokens: every (rest // n)-th, starting at the first."""
    step = max(1, rest // n) if n else 1
    return jnp.arange(0, rest, step, dtype=jnp.int32)[:n]


def visionzip(
    x: Float[Array, "B N E"], scores: Float[Array, "B N"], keys: Float[Array, "B N D"], dominant: int, contextual: int
) -> Zipped:
    """Keeps `dominant` tokens by score and merges the others into `contextual` tokens.

    Args:
      scores: attention from the class token; a score of +inf makes a token dominant.
      keys: keys of the tower's last layer but one, mean over heads.

    Raises:
      ValueError: `dominant` + `contextual` is more than the number of tokens.
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
