"""Attention as arrays: over a block of tokens, and of one token over the slots of a state.

This is the only door to kernels: whoever attends comes through here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.shapes import AttentionOut, Keys, Positions, Queries, Values

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


def causal_attention(
    q: Queries, k: Keys, v: Values, positions: Positions, *, window: Int[Array, ""] | None = None
) -> AttentionOut:
    """Every query attends to the tokens at its own and earlier positions, at most `window` of them.

    Positions grow along T; padding (-1) is attended by nothing, and what a padded query returns has no meaning but
    is finite. Queries are taken in blocks, each against the keys up to its own end only, and a block's weights are
    recomputed for the gradient: half the work of a T x T product, and memory that grows with T, not T squared.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    block = max(128, -(-t // 16))
    q = q.reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4) * d**-0.5
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs = []
    for start in range(0, t, block):
        end = min(start + block, t)
        query, key = positions[:, start:end, None], positions[:, None, :end]
        seen = (key <= query) & (key >= 0)
        if window is not None:
            seen &= key > query - window
        outs.append(_attend_block(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], seen))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def slot_attention(
    q: Float[Array, "B K G D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    occupied: Bool[Array, "B P S"],
    present: Bool[Array, " B"],
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"]]:
    """One query per row and head over the slots of one layer: output, and the probability each slot received.

    Free slots receive nothing; rows in which no query is present (padding) give nothing.
    """
    scores = jnp.einsum("bkgd,bksd->bkgs", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = masked_softmax(scores, occupied[:, :, None], present[:, None, None, None])
    return jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values), weights


def masked_softmax(
    scores: Float[Array, "*batch N"], visible: Bool[Array, "*#batch N"], present: Bool[Array, "*#batch 1"]
) -> Float[Array, "*batch N"]:
    """Probabilities over what is visible, float32; all zero for queries that are not present."""
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights * (present / weights.sum(-1, keepdims=True))


def decode_backend() -> str:
    """What computes `slot_attention` on this machine's default device."""
    return f"jnp on {jax.default_backend()}"


@jax.checkpoint
def _attend_block(
    q: Float[Array, "B K G T D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"], seen: Bool[Array, "B T N"]
) -> Float[Array, "B K G T D"]:
    b, kv, g, t, d = q.shape
    # The query heads of a group are rows of one product: larger products, and K and V are never repeated.
    scores = jnp.einsum("bkqd,bknd->bkqn", q.reshape(b, kv, g * t, d), k, preferred_element_type=jnp.float32)
    scores += jnp.tile(jnp.where(seen, 0.0, MASKED), (1, g, 1))[:, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bkqn,bknd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(b, kv, g, t, d)
