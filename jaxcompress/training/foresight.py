"""Foresight: an auxiliary loss that makes present attention predict future attention.

Policies such as TOVA keep the tokens that are attended to now. A token that is needed in a thousand steps, but ignored
until then, is lost. This loss rewards each layer for giving a little attention, in the mean over its heads, to every
token that a later query attends to strongly. It changes neither architecture nor policy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.recurrence.softmax import masked_softmax
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.shapes import Keys, Positions, Queries


def foresight_loss(
    q: Queries,
    k: Keys,
    positions: Positions,
    sample: Int[Array, "B R"],
    *,
    strong: float = 0.1,
    floor: float = 1 / 512,
    among: int | None = None,
    traits: AttentionTraits = PLAIN,
) -> Float[Array, ""]:
    """How far, in nats, attention falls short of `floor` on tokens that are needed later.

    For a sampled query i and an earlier token j that some later sampled query attends to with probability over `strong`
    in any head: max(0, log floor - log mean_heads p[i, j]), averaged over all such pairs. The gradient flows into
    present attention only, not into future attention.

    Args:
      q, k: rotated.
      sample: ascending indices along T of the sampled queries; far fewer than T, so that no T x T array exists.
      among: raises the target where `floor` is too low, to the attention that the `among`-th most attended token gets
        from a query, so that a token that is needed later survives in a state of `among` slots.
      traits: what the layer's attention does beyond scaled products and a softmax.
    """
    b, _, h, d = q.shape
    at = jnp.take_along_axis(positions, sample, axis=1)
    q = jnp.take_along_axis(q, sample[:, :, None, None], axis=1).reshape(b, sample.shape[1], k.shape[2], -1, d)
    scores = traits.capped(scores_of("brkgd,btkd->bkgrt", q, k))
    earlier = (positions[:, None] <= at[:, :, None]) & (positions[:, None] >= 0)
    present = (at >= 0)[:, None, None, :, None]
    weights = masked_softmax(scores, earlier[:, None, None], present, traits.sinks_beside(scores))
    strongest = jax.lax.stop_gradient(weights.max((1, 2)))  # [B, R, T]
    later = jnp.pad(jax.lax.cummax(strongest, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1), (0, 0)))
    needed = (later > strong) & earlier
    mean = weights.mean((1, 2))  # [B, R, T]
    least = jnp.full((*mean.shape[:2], 1), floor)
    if among is not None and among <= mean.shape[2]:
        least = jnp.maximum(least, jax.lax.top_k(jax.lax.stop_gradient(mean), among)[0][..., -1:])
    short = jnp.maximum(jnp.log(least) - jnp.log(mean + 1e-9), 0.0)
    return (short * needed).sum() / jnp.maximum(needed.sum(), 1)
